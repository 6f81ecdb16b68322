"""Moves expert weights and computes with them. Importing this package alone loads neither torch nor transformers."""
