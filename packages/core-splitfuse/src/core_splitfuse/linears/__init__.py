"""Linear layers whose weights lie as the CPU's matrix multiplication reads them."""
