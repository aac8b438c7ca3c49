"""Run a supervised warm start: train a model on demonstrations that show the format and useful behaviour."""
