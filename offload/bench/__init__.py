"""Measures: speed, several settings against each other, and what a format costs in quality."""
