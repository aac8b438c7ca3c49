"""Run forward and backward passes of a random model, with this project's code or with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpu_checks.bench import Bench
from gpu_checks.models import VOCAB_SIZE

if TYPE_CHECKING:
    from a2tgpo.config.model import Dtype

LENGTHS = (7, 64, 1, 33, 150)
LONG_LENGTHS = (17, 700, 1, 3000, 426)
"""Default of `--lengths` on a machine with a GPU. Without a GPU, the default is `LENGTHS`."""
MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 0.03}
"""Limit in nats for the mean |difference| between this project's log-probs and transformers' log-probs in float32.

On a CPU, the difference is 2e-7 if this project computes in float32, and 0.005 in bfloat16. If attention crossed the
end of a packed sequence, the difference would be 0.5 or more.
"""
MAX_GRADIENT_GAP = {"float32": 1e-4, "bfloat16": 0.06}
"""Limit for |difference| / |gradient| between this project and transformers, with all gradients in one vector.

On a CPU, the value is 5e-7 if this project computes in float32, and 0.015 in bfloat16. If attention crossed the end
of a packed sequence, the value would be 1.2.
"""


def join(bench: Bench) -> Any:
    """Join the other ranks of the check, and return process groups for a layout without model parallelism."""
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.parallel.initialize import initialize

    return initialize(ParallelConfig(), seed=0)


def default_dtype() -> Dtype:
    """Return "bfloat16" on a GPU and "float32" on a CPU."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def trajectories(lengths: Sequence[int]) -> list[Any]:
    """Return a sequence for each length, with one prompt token and `length` sampled tokens."""
    from a2tgpo.refit.verify import probe_tokens, probe_trajectory

    ids, made, start = probe_tokens(VOCAB_SIZE, sum(lengths) + len(lengths)), [], 0
    for length in lengths:
        made.append(probe_trajectory(ids[start : start + length + 1]))
        start += length + 1
    return made


def packed(lengths: Sequence[int], *, parallel: Any = None, fp8: Any = None) -> Any:
    """Pack the sequences that `trajectories(lengths)` returns into one row."""
    from a2tgpo.batch.packing import alignment, pack
    from a2tgpo.config.fp8 import Fp8Config
    from a2tgpo.config.parallel import ParallelConfig

    made = trajectories(lengths)
    return pack(made, range(len(made)), align=alignment(parallel or ParallelConfig(), fp8 or Fp8Config()))


def build(path: str, groups: Any, *, dtype: Dtype, parallel: Any = None, fp8: Any = None) -> Any:
    """Build a policy that keeps complete gradients on every rank."""
    from a2tgpo.config.fp8 import Fp8Config
    from a2tgpo.config.model import ModelConfig
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.config.update import UpdateConfig
    from a2tgpo.model.build import build_policy

    model = ModelConfig(path=path, dtype=dtype, fp8=fp8 or Fp8Config())
    update = UpdateConfig(distributed_optimizer=False)
    return build_policy(model, parallel or ParallelConfig(), groups, update=update)


def logprobs_and_gradients(
    path: str,
    groups: Any,
    *,
    dtype: Dtype,
    lengths: Sequence[int] = LENGTHS,
    parallel: Any = None,
    fp8: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the log-probs [tokens] of all sampled tokens, and {Hugging Face name: gradient of their mean}."""
    import torch

    from a2tgpo.model.weights import iterate_hf_weights
    from a2tgpo.update.logprobs import compute_logprobs
    from a2tgpo.update.train_step import compute_gradients

    policy = build(path, groups, dtype=dtype, parallel=parallel, fp8=fp8)
    batch = packed(lengths, parallel=parallel, fp8=fp8)
    sampled = batch.loss_mask[0].to(groups.device)
    (scored,) = compute_logprobs(policy, [batch])
    assert scored is not None, "there is one pipeline stage"

    def mean_logprob(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        return logprobs[sampled].mean() / groups.dp_size, {}

    compute_gradients(policy, [batch], mean_logprob)
    with torch.no_grad():  # the iterator below yields parameters, so copy gradients into them
        for parameter in policy.chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.float().cpu().clone() for name, tensor in iterate_hf_weights(policy)}
    return scored.logprobs[sampled].float().cpu(), gradients


def logprobs_by_branches(path: str, groups: Any, *, dtype: Dtype) -> Any:
    """Return log-probs of the last sequence of `LENGTHS` from its third token on, scored in branches of ten."""
    import torch

    from a2tgpo.batch.probes import Probe, ProbedSequence
    from a2tgpo.config.model import ModelConfig
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.model.build import build_policy
    from a2tgpo.update.probe_logprobs import compute_probe_logprobs

    model = ModelConfig(path=path, dtype=dtype)
    policy = build_policy(model, ParallelConfig(), groups, update=None, trainable=False)
    tokens = trajectories(LENGTHS)[-1].tokens
    probes = [
        Probe(
            prefix_length=start - 1, scaffold=(tokens[start - 1],), answer=tuple(tokens[start : start + 10])
        )
        for start in range(2, len(tokens), 10)
    ]
    (found,) = compute_probe_logprobs(policy, [ProbedSequence(tokens=tokens, probes=probes)], max_tokens=4096)
    return torch.tensor([logprob for branch in found for logprob in branch])


def by_transformers(path: str, device: Any, lengths: Sequence[int] = LENGTHS) -> tuple[Any, dict[str, Any]]:
    """Return the same as `logprobs_and_gradients`, computed by transformers in float32, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(
        device
    )
    logprobs = []
    for trajectory in trajectories(lengths):
        tokens = torch.tensor([[*trajectory.prompt_tokens, *trajectory.turns[0].tokens]], device=device)
        rows = model(tokens[:, :-1]).logits[0].log_softmax(-1)
        logprobs.append(rows.gather(-1, tokens[0, 1:, None])[:, 0])
    joined = torch.cat(logprobs)
    joined.mean().backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return joined.detach().cpu(), gradients


def distance(gradients: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return |gradients - expected| / |expected|, with the gradients of all weights in one vector."""
    assert gradients.keys() == expected.keys(), "the same weights"
    difference = sum((gradients[name] - expected[name]).square().sum().item() for name in expected)
    return (difference / sum(tensor.square().sum().item() for tensor in expected.values())) ** 0.5


def release() -> None:
    """Free the GPU memory of unused models."""
    import gc

    import torch

    gc.collect()  # needed because Megatron's models have reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
