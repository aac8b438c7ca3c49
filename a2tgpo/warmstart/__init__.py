"""Supervised warm start: a model learns the format, and the first good habits, from demonstrations."""
