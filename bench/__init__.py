"""Programs that measure; each prints what, per second, CPU per message and the ratio to its peer."""
