"""Recipes that core brings: training a language model, and the quickstart built on it."""
