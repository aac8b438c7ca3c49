"""Code that the web tools share: requests with limits, public addresses, recorded answers."""
