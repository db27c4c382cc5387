"""Formats that checkpoints are converted to: files to be made, and what goes where in them."""
