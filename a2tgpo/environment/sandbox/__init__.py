"""Processes that run the policy's Python code with limits, and without access to the network or the trainer's
files."""
