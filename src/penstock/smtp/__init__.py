"""THE LANGUAGE: bytes in, events out, replies back. Pure: no sockets, no clock, no trio."""
