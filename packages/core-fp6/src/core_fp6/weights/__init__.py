"""Weights of six bits: formats of codes, scales, and both packed together."""
