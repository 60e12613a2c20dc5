"""One-token state updates of both state-space operators."""
