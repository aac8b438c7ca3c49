"""What the policy acts on: tools that take a text and return a text."""
