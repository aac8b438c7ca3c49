"""Run a supervised warm start: train a model on demonstrations of the format and of useful behaviour."""
