"""The live page of a sink and its HTTP API, in the trio loop of the sessions. Needs the extra `web`."""
