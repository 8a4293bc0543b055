-- The spool: messages that were accepted and have recipients left. Times are seconds since the epoch.

-- One message, for all its recipients. Rows go as soon as no recipient is left.
CREATE TABLE message (
    number      INTEGER PRIMARY KEY,    -- grows, and is never used again while the spool is open
    id          TEXT NOT NULL,          -- the id that the client and the journal know
    sender      TEXT NOT NULL,          -- the reverse-path; '' of a bounce
    parameters  BLOB,                   -- what else MAIL said, as JSON; NULL when it said nothing
    received_at REAL NOT NULL,
    size        INTEGER NOT NULL,       -- octets of the body
    prefix      BLOB NOT NULL,          -- the fields this server adds above the body
    body        BLOB                    -- NULL: a file of the folder bodies, named by the number
);

-- Answers what an operator asks of all messages, the oldest first, without reading their bodies.
CREATE INDEX message_listed ON message (number, id, sender, size, received_at);

-- The messages whose bodies are files: asked for at the start. It costs the others nothing.
CREATE INDEX message_filed ON message (number) WHERE body IS NULL;

-- One recipient of a message. The upper bits of its number are the number of its message, the lower 20 its place.
CREATE TABLE recipient (
    number      INTEGER PRIMARY KEY,
    lane        INTEGER NOT NULL,       -- which mail it waits with
    state       INTEGER NOT NULL,       -- 0 due, 1 being attempted, 2 held by the operator
    due_at      REAL NOT NULL,          -- not to be attempted before; negative: an operator asked for it then (QueueAdmin)
    attempts    INTEGER NOT NULL,       -- those that have begun
    address     TEXT NOT NULL,          -- the forward-path
    dsn         BLOB,                   -- NOTIFY and ORCPT as JSON; NULL when it has none
    last_reply  TEXT NOT NULL,          -- what the next hop said last, or why it could not be asked
    delay_told  INTEGER NOT NULL        -- the sender was told that it is late
);

-- What a lane has due, in order. Recipients that are being attempted are not in it: a message that is handed to the
-- relay as it is written costs this index nothing.
CREATE INDEX recipient_due ON recipient (lane, due_at) WHERE state = 0;

-- A lane: recipients that are attempted together.
CREATE TABLE lane (
    number      INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,   -- the domain, in lower case
    due_at      REAL                    -- no recipient is due before; NULL: none waits
);

CREATE INDEX lane_due ON lane (due_at) WHERE due_at IS NOT NULL;

PRAGMA user_version = 2;
