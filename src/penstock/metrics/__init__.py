"""Counters and latency histograms of sessions."""
