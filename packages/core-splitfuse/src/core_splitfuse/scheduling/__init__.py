"""Which tokens of which requests run in the next forward pass."""
