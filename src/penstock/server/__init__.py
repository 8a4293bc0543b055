"""The server: admission, sessions, bodies, and the worker that runs them."""
