"""Single files that every other tool reads: safetensors with a Python tree, and ``.pt``."""
