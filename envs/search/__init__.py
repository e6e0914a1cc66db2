"""Simulated and real search: questions over a fictional world, or over the user's own data."""

from loopwright.envs.search.environment import Search

__all__ = ["Search"]
