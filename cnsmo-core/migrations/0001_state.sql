-- The core's durable state. One writer; keys compare by bytes; times are the core's clock in milliseconds since 1970.

-- One row. rev: last revision given out. compact_rev: log rows up to here may be missing. epoch: raised by a restore
-- from backup, after which revisions may go back once.
CREATE TABLE meta (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  rev INTEGER NOT NULL,
  compact_rev INTEGER NOT NULL DEFAULT 0,
  epoch INTEGER NOT NULL DEFAULT 1
) STRICT;
INSERT INTO meta (id, rev) VALUES (1, 0);

-- The present. version: 1 at creation, +1 per put.
CREATE TABLE kv (
  key TEXT PRIMARY KEY,
  value BLOB NOT NULL,
  create_rev INTEGER NOT NULL,
  mod_rev INTEGER NOT NULL,
  version INTEGER NOT NULL
) STRICT;

-- The past. sub: position inside one revision's transaction. op: 1 put, 2 delete. value: NULL on a delete.
-- prev_rev: the key's mod_rev before, 0 if it was absent.
CREATE TABLE log (
  rev INTEGER NOT NULL,
  sub INTEGER NOT NULL,
  op INTEGER NOT NULL CHECK (op IN (1, 2)),
  key TEXT NOT NULL,
  value BLOB,
  prev_rev INTEGER NOT NULL,
  time_ms INTEGER NOT NULL,
  PRIMARY KEY (rev, sub)
) STRICT;
CREATE INDEX log_key ON log (key, rev, sub);
