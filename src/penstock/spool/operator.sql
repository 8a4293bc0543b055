-- What operators and the server tell each other. Added in version 3.

-- What an operator wants done with a recipient that a server may have in memory. The server answers within a second.
CREATE TABLE instruction (
    recipient   INTEGER PRIMARY KEY,    -- the number of the recipient
    action      TEXT NOT NULL,          -- hold, drop, retry or bounce
    is_done     INTEGER                 -- NULL: not answered yet; 0: not done, because it is being delivered
);

-- What an operator did, for the journal of the server.
CREATE TABLE admin_event (
    number      INTEGER PRIMARY KEY,
    action      TEXT NOT NULL,
    id          TEXT NOT NULL,          -- of the message; '' when too many messages are concerned to name them
    recipients  INTEGER NOT NULL
);

-- Domains, and next hops by host or by full name, to which nothing is sent until they are resumed.
CREATE TABLE suspended (name TEXT PRIMARY KEY) WITHOUT ROWID;

-- The next hops that are backing off, written by the server when that changes.
CREATE TABLE hop (
    name        TEXT PRIMARY KEY,
    since       REAL NOT NULL,
    until       REAL NOT NULL,          -- not tried before
    reason      TEXT NOT NULL
) WITHOUT ROWID;

PRAGMA user_version = 3;
