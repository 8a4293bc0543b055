"""Who a client is: the authenticator seam and the users file."""
