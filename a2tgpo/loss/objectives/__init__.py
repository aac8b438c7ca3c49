"""The objectives, which define the policy loss. `algorithm.objective` selects a module by its name.

Each module has this function, which returns the policy term of each sampled token of a micro-batch:

    def token_losses(logprobs: Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses

`logprobs` is [n] with gradient. `loss.policy_loss` adds the importance weights, the KL penalty, the entropy term and
the weights of the aggregation.
"""
