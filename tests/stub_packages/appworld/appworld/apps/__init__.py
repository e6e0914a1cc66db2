"""Stub of the apps."""


def get_all_apps():
    """Their names."""
    return ["alpha"]
