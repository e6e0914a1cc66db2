"""Stub of an app."""
