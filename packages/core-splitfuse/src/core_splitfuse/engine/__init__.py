"""The engine: requests in, one ragged pass through the model at a time, tokens out."""
