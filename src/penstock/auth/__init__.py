"""Authentication of clients: the authenticator interface, the users file, SASL exchanges, and the throttle."""
