"""Sockets: streams, TLS, listeners, the PROXY protocol."""
