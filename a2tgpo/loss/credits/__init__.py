"""The token credits. `algorithm.token_credit` selects a module by its name.

Each module has this function, which returns an advantage for each sampled token of a micro-batch:

    def token_credit(logprobs: Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenCredit

`logprobs` is [n] without gradient: the log-probs of the current policy. `inputs.advantages` has the advantages of the
turns.
"""
