"""Decides which experts stay resident. Standard library and numpy only: no torch, no weight I/O, no threads."""
