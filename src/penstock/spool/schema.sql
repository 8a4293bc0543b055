-- The spool: accepted messages with recipients left. Times are seconds since the epoch.

-- One message, for all its recipients. The row is deleted as soon as no recipient is left.
CREATE TABLE message (
    number      INTEGER PRIMARY KEY,    -- ascending, never reused while the spool is open
    id          TEXT NOT NULL,          -- the id that the client and the journal know
    sender      TEXT NOT NULL,          -- the reverse-path; '' of a bounce
    parameters  BLOB,                   -- the other parameters of MAIL as JSON; NULL if all are default
    received_at REAL NOT NULL,
    size        INTEGER NOT NULL,       -- octets of the body
    prefix      BLOB NOT NULL,          -- the header fields that this server adds above the body
    body        BLOB                    -- NULL: a file of the folder bodies, named by the number
);

-- Covers what an operator lists of all messages, the oldest first, without reading bodies.
CREATE INDEX message_listed ON message (number, id, sender, size, received_at);

-- Messages whose bodies are files: read at the start. Costs the others nothing.
CREATE INDEX message_filed ON message (number) WHERE body IS NULL;

-- One recipient of a message. The upper bits of its number are the number of its message, the lower 20 its place.
CREATE TABLE recipient (
    number      INTEGER PRIMARY KEY,
    queue       INTEGER NOT NULL,       -- the domain queue it waits in
    state       INTEGER NOT NULL,       -- 0 due, 1 being attempted, 2 held by the operator
    due_at      REAL NOT NULL,          -- not attempted before; negative: an operator asked for it then (QueueAdmin)
    attempts    INTEGER NOT NULL,       -- attempts that have begun
    address     TEXT NOT NULL,          -- the forward-path
    dsn         BLOB,                   -- NOTIFY and ORCPT as JSON; NULL if neither was given
    last_reply  TEXT NOT NULL,          -- the last reply of the next hop, or why there was none
    delay_told  INTEGER NOT NULL        -- the sender has been notified of the delay
);

-- The recipients of a queue in the order they are due. Recipients that are being attempted are not in it: a message
-- that is handed to the relay as it is written costs this index nothing.
CREATE INDEX recipient_due ON recipient (queue, due_at) WHERE state = 0;

-- A domain queue: recipients that are attempted together.
CREATE TABLE queue (
    number      INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,   -- the domain, in lower case
    due_at      REAL                    -- no recipient is due before; NULL: none waits
);

CREATE INDEX queue_due ON queue (due_at) WHERE due_at IS NOT NULL;
