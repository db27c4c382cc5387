"""Products with six-bit weights: a reference in torch, and one backend per kind of device."""
