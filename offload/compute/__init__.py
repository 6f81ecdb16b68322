"""Products of experts and of other matrices with quantised weights, on the CPU."""
