"""Ranks that share a sequence: who has which tokens, and who attends with which heads."""
