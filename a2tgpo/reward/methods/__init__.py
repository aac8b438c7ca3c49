"""The modules of the rewards. `reward.names` may list each module by its name.

Each module must have the function `build(config: RunConfig) -> Reward`.
"""
