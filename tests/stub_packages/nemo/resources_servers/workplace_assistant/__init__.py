"""Stub of the servers."""
