"""What fits where, and how records travel."""
