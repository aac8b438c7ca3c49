"""Processes that run the policy's Python code. They have limits, no network, and no view of the trainer's files."""
