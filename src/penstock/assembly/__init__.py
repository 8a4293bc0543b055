"""The parts of a server, made from its settings. `penstock.app` puts them together."""
