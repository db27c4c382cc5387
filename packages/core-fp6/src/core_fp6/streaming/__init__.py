"""Folders of safetensors, quantized and back in the memory of a few tensors."""
