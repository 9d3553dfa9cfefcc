-- The core's durable state. Keys compare by bytes; times are the core's clock in milliseconds since 1970, never the
-- database's. This is SQLite's form; PostgreSQL's is made from it (store/schema.rs).

-- One row; the first statement of every commit locks it. rev: last revision given out. compact_rev: log rows up to here may
-- be missing. epoch: raised by a restore from backup, after which revisions may go back once. msg_seq: last message
-- sequence given out. fence: last lease and fencing token given out.
CREATE TABLE meta (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  schema_version INTEGER NOT NULL,
  rev INTEGER NOT NULL,
  compact_rev INTEGER NOT NULL,
  epoch INTEGER NOT NULL,
  msg_seq INTEGER NOT NULL,
  fence INTEGER NOT NULL
) STRICT;
INSERT INTO meta (id, schema_version, rev, compact_rev, epoch, msg_seq, fence) VALUES (1, 1, 0, 0, 1, 0, 0);

-- The present. version: 1 at creation, +1 per put. lease_id 0: no lease.
CREATE TABLE kv (
  key TEXT PRIMARY KEY,
  value BLOB NOT NULL,
  content_type TEXT NOT NULL,
  create_rev INTEGER NOT NULL,
  mod_rev INTEGER NOT NULL,
  version INTEGER NOT NULL,
  lease_id INTEGER NOT NULL
) STRICT;
CREATE INDEX kv_lease ON kv (lease_id) WHERE lease_id <> 0;

-- The past. sub: position inside one revision's transaction. op: 1 put, 2 delete, 3 expire. value: NULL on a delete.
-- prev_rev: the key's mod_rev before, 0 if it was absent. identity: who wrote it. There is no index by key: it would double
-- what a put writes. What a key was is found from its next change, by prev_rev.
CREATE TABLE log (
  rev INTEGER NOT NULL,
  sub INTEGER NOT NULL,
  op INTEGER NOT NULL CHECK (op IN (1, 2, 3)),
  key TEXT NOT NULL,
  value BLOB,
  content_type TEXT NOT NULL,
  create_rev INTEGER NOT NULL,
  version INTEGER NOT NULL,
  lease_id INTEGER NOT NULL,
  prev_rev INTEGER NOT NULL,
  identity TEXT NOT NULL,
  time_ms INTEGER NOT NULL,
  PRIMARY KEY (rev, sub)
) STRICT, WITHOUT ROWID;

-- Grants and holders; when a lease ends is in its holder's memory. fence: its fencing token. holder: the core that counts it
-- down; holder_epoch: raised whenever a core takes it.
CREATE TABLE lease (
  lease_id INTEGER PRIMARY KEY,
  owner TEXT NOT NULL,
  ttl_ms INTEGER NOT NULL,
  fence INTEGER NOT NULL,
  holder TEXT NOT NULL,
  holder_epoch INTEGER NOT NULL
) STRICT;

-- Answers to repeated requests (AIP-155), until expire_ms.
CREATE TABLE request (
  identity TEXT NOT NULL,
  request_id TEXT NOT NULL,
  reply BLOB NOT NULL,
  expire_ms INTEGER NOT NULL,
  PRIMARY KEY (identity, request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX request_expire ON request (expire_ms);

-- Who did what. hash: SHA-256 of the hash before and this row.
CREATE TABLE audit (
  seq INTEGER PRIMARY KEY,
  time_ms INTEGER NOT NULL,
  identity TEXT NOT NULL,
  role TEXT NOT NULL,
  rpc TEXT NOT NULL,
  decision TEXT NOT NULL,
  status TEXT NOT NULL,
  rev INTEGER NOT NULL,
  detail TEXT NOT NULL,
  hash BLOB NOT NULL
) STRICT;

-- Streams of durable messages. last_seq: last sequence given out. messages, bytes: what the stream holds.
CREATE TABLE stream (
  name TEXT PRIMARY KEY,
  last_seq INTEGER NOT NULL,
  messages INTEGER NOT NULL,
  bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Durable messages. grp: the one group that it is for; empty: all. body: a cnsmo.bus.v1.Message.
CREATE TABLE message (
  stream TEXT NOT NULL,
  seq INTEGER NOT NULL,
  grp TEXT NOT NULL,
  subject TEXT NOT NULL,
  ordering_key TEXT NOT NULL,
  publish_ms INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (stream, seq)
) STRICT, WITHOUT ROWID;

-- Ids chosen by publishers, until expire_ms. seq: the message that is kept.
CREATE TABLE message_id (
  stream TEXT NOT NULL,
  message_id TEXT NOT NULL,
  seq INTEGER NOT NULL,
  expire_ms INTEGER NOT NULL,
  PRIMARY KEY (stream, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX message_id_expire ON message_id (expire_ms);

-- Queue groups. next_seq: what is behind it, the group has not looked at. ack_wait_ms, attempts_max: as its newest member
-- wants it.
CREATE TABLE queue_group (
  stream TEXT NOT NULL,
  name TEXT NOT NULL,
  subject TEXT NOT NULL,
  next_seq INTEGER NOT NULL,
  ack_wait_ms INTEGER NOT NULL,
  attempts_max INTEGER NOT NULL,
  PRIMARY KEY (stream, name)
) STRICT, WITHOUT ROWID;

-- What a group has looked at and not acknowledged. holder: the core whose member has it; empty: nobody. visible_ms: not given
-- to anybody before; the largest number: not before the message of its key before it is acknowledged.
CREATE TABLE delivery (
  stream TEXT NOT NULL,
  grp TEXT NOT NULL,
  seq INTEGER NOT NULL,
  ordering_key TEXT NOT NULL,
  holder TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  visible_ms INTEGER NOT NULL,
  PRIMARY KEY (stream, grp, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX delivery_due ON delivery (stream, grp, visible_ms, seq);
CREATE INDEX delivery_key ON delivery (stream, grp, ordering_key, seq) WHERE ordering_key <> '';
