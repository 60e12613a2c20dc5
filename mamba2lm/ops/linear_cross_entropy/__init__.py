"""Language-model head and cross-entropy in one operator."""
