"""The step of this package in core's quickstart: the run goes on elsewhere, and comes back."""
