"""Servers of the taskset."""
