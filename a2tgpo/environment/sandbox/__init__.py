"""Processes that run the policy's Python code, with limits and without network or access to the trainer's files."""
