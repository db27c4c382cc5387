"""Files of other programs, read and written byte by byte: archives of torch, safetensors, DCP."""
