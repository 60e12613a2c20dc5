"""Training: the loop, and the plain objects it calls by name."""
