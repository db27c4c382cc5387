"""Attention over stored keys and values, for the tokens of many sequences in one packed row."""
