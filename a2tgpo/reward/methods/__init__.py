"""The modules of the rewards. `reward.names` may list each module by its name.

Each module must have a function `build`, which takes the `RunConfig` and returns the reward.
"""
