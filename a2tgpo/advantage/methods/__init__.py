"""The methods: module NAME is what `algorithm.advantage: NAME` asks for, so a new method is one new file here.

Each has one function, called by every rank of `dp_group`, also with an empty table:

    def advantages(table: TurnTable, config: AlgorithmConfig, *, dp_group) -> TurnAdvantages
"""
