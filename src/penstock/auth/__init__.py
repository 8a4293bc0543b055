"""Authentication of clients: the authenticator seam, the users file, logins and their throttle."""
