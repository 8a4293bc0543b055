"""Policies: checks of clients, recipients and messages, and the pipeline that calls them."""
