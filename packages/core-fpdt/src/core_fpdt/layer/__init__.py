"""A decoder layer run chunk by chunk, forwards and backwards."""
