"""One token a row from its logits, in one kernel."""
