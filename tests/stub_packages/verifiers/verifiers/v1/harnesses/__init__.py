"""Stub of verifiers 0.4.0: the part of its shape that the adapter touches."""
