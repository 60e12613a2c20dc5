"""State-space duality: the Mamba-2 sequence map."""
