"""The skeleton from transformers, and the function that runs its routed experts."""
