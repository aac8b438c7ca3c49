"""The advantage methods: `algorithm.advantage: NAME` selects module NAME, so a new method is one new file in this
folder.

Each module has one function, which every rank of `dp_group` calls, even with an empty table:

    def advantages(table: TurnTable, config: AlgorithmConfig, *, dp_group) -> TurnAdvantages
"""
