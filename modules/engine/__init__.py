"""The generation engine: everything that computes with tensors."""
