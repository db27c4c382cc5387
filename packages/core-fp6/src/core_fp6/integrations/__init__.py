"""What other libraries are told of six-bit weights."""
