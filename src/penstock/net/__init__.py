"""SOCKETS: streams, TLS, listeners, the PROXY protocol."""
