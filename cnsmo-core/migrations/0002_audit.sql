-- Who did what. Each hash covers the one before: cnsmo-service/src/audit.rs.
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
