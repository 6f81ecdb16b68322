"""Checkpoints: where a model comes from, which tensors make up an expert, and the expert file."""
