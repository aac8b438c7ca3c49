"""The policy's environment, which consists of tools that take a text and return texts."""
