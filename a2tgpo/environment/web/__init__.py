"""What the tools that reach the web share: requests with limits, public addresses, recorded answers."""
