"""Stub of its APIs."""
