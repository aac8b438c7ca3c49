"""The policy's environment: tools that take a text and return texts."""
