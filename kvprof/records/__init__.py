"""Plain data, no tensors: what the stages hand each other."""
