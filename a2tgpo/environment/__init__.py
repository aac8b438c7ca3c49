"""What the policy acts on: tools that take a text and answer with text."""
