"""What a configuration needs of memory and time on a given cluster: arithmetic only, no torch, no GPU."""
