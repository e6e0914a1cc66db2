"""Tasks, worlds, tools and rewards, and the protocol a plugin implements."""
