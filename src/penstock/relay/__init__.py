"""From the spool to the next hop: what is due, by which way, over which connection, and what came of it."""
