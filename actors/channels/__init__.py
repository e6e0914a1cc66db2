"""Weight channels: how a policy version gets from the trainer into every engine, and is proven."""
