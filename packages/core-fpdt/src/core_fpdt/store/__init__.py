"""Where chunks wait: on the device, in host memory, in files; budgets and proofs."""
