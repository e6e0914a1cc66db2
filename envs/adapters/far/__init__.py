"""Far sides: files that run in interpreters of their own, which need not have Loopwright."""
