"""From logits to text: sampling, detokenisation, stop strings, and batches of prompts."""
