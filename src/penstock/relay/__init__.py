"""From the spool to the next hop: what is due, by which route, over which connection, and with what result."""
