"""The gate of an MLP."""
