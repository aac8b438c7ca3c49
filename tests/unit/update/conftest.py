from tiny_policy import policy, trajectories  # noqa: F401
