"""The advantage methods. `algorithm.advantage: NAME` selects module NAME.

Each module has this function, which every rank of `dp_group` must call, even with an empty table:

    def advantages(table: TurnTable, config: AlgorithmConfig, *, dp_group) -> TurnAdvantages
"""
