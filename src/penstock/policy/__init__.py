"""What a gateway thinks of a client or a message: the policy seam and its pipeline."""
