"""How fast saves and loads are, against torch, safetensors, DCP and the raw disk, in one process."""
