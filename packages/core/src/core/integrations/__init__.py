"""Core inside other people's training loops."""
