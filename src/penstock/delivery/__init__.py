"""Where an accepted message goes: the delivery seam and its kinds."""
