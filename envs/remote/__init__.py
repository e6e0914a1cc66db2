"""Environments that live elsewhere: in an interpreter of their own, or behind HTTP."""

from loopwright.envs.remote.http_env import HttpEnv
from loopwright.envs.remote.process_env import ProcessEnv

__all__ = ["HttpEnv", "ProcessEnv"]
