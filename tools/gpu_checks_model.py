"""The model's forward and backward pass on this machine's layers: packing, FP8, context parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.gpu_checks_run import Bench

LENGTHS = (7, 64, 1, 33, 150)
MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 0.03}
"""Mean |difference| of log-probs from transformers in float32, nats. The CPU twin is at 2e-7 and 0.006; attention
that does not stop at the end of a packed sequence would be at 0.6."""
MAX_GRADIENT_GAP = {"float32": 1e-4, "bfloat16": 0.06}
"""|difference| / |gradient|, over all weights as one vector. The twin is at 6e-7 and 0.017, that attention at 1.3."""
MAX_FP8_LOGPROB_GAP = 0.2
MAX_FP8_GRADIENT_GAP = 0.35
"""Of FP8 from bfloat16, in the same measures. Log-probs are off by 0.07 with every recipe where its forward pass is
emulated (tools/fp8_emulation.py); for gradients there is no such number yet."""


def write_model(folder: Path, *, vocab_size: int = 480) -> str:
    """A random Qwen3 of four layers in the shapes that kernels for large ones take; returns its folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the default, else every distribution is uniform and errors do not show.
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.bfloat16().save_pretrained(folder)
    return str(folder)


def check_packed_attention(bench: Bench) -> None:
    """Packed sequences of different lengths against transformers, which runs them one by one in float32."""
    import torch

    groups, path = _start(bench)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    logprobs, gradients = _run(path, groups, dtype=dtype)
    expected, expected_gradients = _by_transformers(path, groups.device)
    layers = "Transformer Engine" if dtype == "bfloat16" else "CPU twin"
    gap = (logprobs - expected).abs().mean().item()
    bench.at_most("packed attention, log-probs", gap, MAX_LOGPROB_GAP[dtype], "nats", f"{layers}, {dtype}")
    bench.at_most(
        "packed attention, gradients", _distance(gradients, expected_gradients), MAX_GRADIENT_GAP[dtype]
    )
    branches = _by_branches(path, groups, dtype=dtype)
    gap = (branches - expected[-len(branches) :]).abs().mean().item()
    bench.at_most("branches of one sequence, log-probs", gap, MAX_LOGPROB_GAP[dtype], "nats")


def check_context_parallel(bench: Bench) -> None:
    """Sequences split over two ranks against whole ones."""
    import torch

    if bench.world_size < 2 or bench.world_size % 2:
        return bench.skip("context parallel", f"{bench.world_size} ranks; it takes an even number")
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.parallel.initialize import lay_out

    groups, path = _start(bench)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    whole = _run(path, groups, dtype=dtype)
    split = ParallelConfig(context=2)
    parts = _run(path, lay_out(split, seed=0), dtype=dtype, parallel=split)
    gap = (whole[0] - parts[0]).abs().mean().item()
    bench.at_most("context parallel, log-probs", gap, MAX_LOGPROB_GAP[dtype], "nats", f"2 ranks, {dtype}")
    bench.at_most("context parallel, gradients", _distance(parts[1], whole[1]), MAX_GRADIENT_GAP[dtype])
    return None


def check_fp8(bench: Bench) -> None:
    """Each recipe against bfloat16; one that gives the very same numbers was not in force, and fails too."""
    import torch

    from a2tgpo.config.check import ConfigError
    from a2tgpo.config.fp8 import TOKEN_MULTIPLES, Fp8Config

    if not torch.cuda.is_available():
        return bench.skip("fp8", "no GPU is seen; FP8 is computed by Transformer Engine")
    groups, path = _start(bench)
    plain = _run(path, groups, dtype="bfloat16")
    for recipe in TOKEN_MULTIPLES:
        try:
            fp8 = _run(path, groups, dtype="bfloat16", fp8=Fp8Config(format="hybrid", recipe=recipe))
        except ConfigError as error:
            bench.skip(f"fp8 {recipe}", str(error))
            continue
        gap = (fp8[0] - plain[0]).abs().mean().item()
        if gap == 0.0:
            raise RuntimeError(f"FP8 {recipe} gave bfloat16's log-probs to the bit: it was not in force")
        bench.at_most(f"fp8 {recipe}, log-probs", gap, MAX_FP8_LOGPROB_GAP, "nats")
        bench.at_most(f"fp8 {recipe}, gradients", _distance(fp8[1], plain[1]), MAX_FP8_GRADIENT_GAP)
    return None


def _start(bench: Bench) -> tuple[Any, str]:
    """Join the other ranks; the model, the same on all."""
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.parallel.initialize import initialize

    path = write_model(
        bench.work / f"model-{bench.rank}"
    )  # transformers writes on the first rank only, once joined
    return initialize(ParallelConfig(), seed=0), path


def _trajectories() -> list[Any]:
    from a2tgpo.refit.verify import probe_tokens, probe_trajectory

    ids, made, start = probe_tokens(480, sum(LENGTHS) + len(LENGTHS)), [], 0
    for length in LENGTHS:
        made.append(probe_trajectory(ids[start : start + length + 1]))
        start += length + 1
    return made


def _run(path: str, groups: Any, *, dtype: str, parallel: Any = None, fp8: Any = None) -> tuple[Any, Any]:
    """Log-probs [tokens] of all sampled tokens, and the gradient of their mean by HF name, on the CPU."""
    import torch

    from a2tgpo.batch.packing import alignment, pack
    from a2tgpo.config.fp8 import Fp8Config
    from a2tgpo.config.model import ModelConfig
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.config.update import UpdateConfig
    from a2tgpo.model.build import build_policy
    from a2tgpo.model.weights import iterate_hf_weights
    from a2tgpo.update.score import score
    from a2tgpo.update.train_step import compute_gradients

    parallel, fp8 = parallel or ParallelConfig(), fp8 or Fp8Config()
    model = ModelConfig(path=path, dtype=dtype, fp8=fp8)
    policy = build_policy(model, parallel, groups, update=UpdateConfig(distributed_optimizer=False))
    trajectories = _trajectories()
    batch = pack(trajectories, range(len(trajectories)), align=alignment(parallel, fp8))
    sampled = batch.loss_mask[0].to(groups.device)
    (scored,) = score(policy, [batch])
    assert scored is not None, "there is one pipeline stage"

    def mean_logprob(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        return logprobs[sampled].mean() / groups.dp_size, {}

    compute_gradients(policy, [batch], mean_logprob)
    with torch.no_grad():  # gradients travel home by the way that weights do
        for parameter in policy.chunks[0].parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]  # Megatron's, beside torch's grad
    gradients = {name: tensor.float().cpu().clone() for name, tensor in iterate_hf_weights(policy)}
    return scored.logprobs[sampled].float().cpu(), gradients


def _by_branches(path: str, groups: Any, *, dtype: str) -> Any:
    """Log-probs of the last sequence's tokens from the third on, ten at a time, as branches."""
    import torch

    from a2tgpo.batch.probes import Probe, ProbedSequence
    from a2tgpo.config.model import ModelConfig
    from a2tgpo.config.parallel import ParallelConfig
    from a2tgpo.model.build import build_policy
    from a2tgpo.update.probe_scores import score_probes

    model = ModelConfig(path=path, dtype=dtype)
    policy = build_policy(model, ParallelConfig(), groups, update=None, trainable=False)
    tokens = _trajectories()[-1].tokens
    probes = [
        Probe(
            prefix_length=start - 1, scaffold=(tokens[start - 1],), answer=tuple(tokens[start : start + 10])
        )
        for start in range(2, len(tokens), 10)
    ]
    (found,) = score_probes(policy, [ProbedSequence(tokens=tokens, probes=probes)], max_tokens=4096)
    return torch.tensor([logprob for branch in found for logprob in branch])


def _by_transformers(path: str, device: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(
        device
    )
    logprobs = []
    for trajectory in _trajectories():
        tokens = torch.tensor([[*trajectory.prompt_tokens, *trajectory.turns[0].tokens]], device=device)
        rows = model(tokens[:, :-1]).logits[0].log_softmax(-1)
        logprobs.append(rows.gather(-1, tokens[0, 1:, None])[:, 0])
    joined = torch.cat(logprobs)
    joined.mean().backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return joined.detach().cpu(), gradients


def _distance(gradients: dict[str, Any], expected: dict[str, Any]) -> float:
    """|difference| / |expected| over all weights."""
    assert gradients.keys() == expected.keys(), "the same weights"
    difference = sum((gradients[name] - expected[name]).square().sum().item() for name in expected)
    return (difference / sum(tensor.square().sum().item() for tensor in expected.values())) ** 0.5
