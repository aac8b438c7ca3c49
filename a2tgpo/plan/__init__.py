"""Predict how much memory and time a configuration needs on a given cluster, without torch and without a GPU."""
