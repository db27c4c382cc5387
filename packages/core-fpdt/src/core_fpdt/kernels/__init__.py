"""Blocks of attention with their log-sum-exp, forwards and backwards."""
