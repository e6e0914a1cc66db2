"""Records, advantages, losses, packing: pure functions over arrays and tensors."""
