"""Measure a model in several layouts. Every rank of test_model_layouts.py runs this program, and rank 0 writes the
results as JSON.

The program measures, and the test judges the measurements. Claims about every single rank are asserted in the
program.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tiny_models import checkpoint_tensors

from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.forward import forward_packed
from a2tgpo.model.logprobs import token_logprobs
from a2tgpo.model.weights import iterate_hf_weights, save_hf
from a2tgpo.parallel.collectives import all_gather_object, broadcast_bytes, broadcast_object, send_bytes
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize, lay_out, shutdown

LENGTHS = [7, 20, 5, 1]  # 33 tokens: odd, so that sequence parallelism has to pad


def main(checkpoints: Path, out: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(210, exit=True)  # before the test's own time limit
    measured: dict[str, Any] = {}
    initialize(ParallelConfig(), seed=0)
    for parallel, cases in (
        (ParallelConfig(tensor=2, pipeline=2), [("qwen2", "none"), ("qwen3", "none"), ("llama", "full")]),
        (ParallelConfig(tensor=2, pipeline=2, sequence=True), [("qwen3", "selective"), ("qwen2", "full")]),
        (ParallelConfig(tensor=2, sequence=True), [("llama", "none")]),
        (ParallelConfig(pipeline=4), [("qwen2", "none")]),
    ):
        groups = lay_out(parallel, seed=0)
        layout = f"tp{parallel.tensor}pp{parallel.pipeline}{'sp' if parallel.sequence else ''}"
        for kind, recompute in cases:
            model = ModelConfig(path=str(checkpoints / kind), dtype="float32", recompute=recompute)
            measured[f"{kind}-{layout}"] = check_against_transformers(model, parallel, groups, out)
        if parallel == ParallelConfig(tensor=2, pipeline=2):
            measured["exchange"] = check_exchange(groups)
            measured["logprobs"] = check_token_logprobs(groups)
            measured["bfloat16"] = check_bfloat16(checkpoints, parallel, groups)
            measured["refused"] = check_refusals(checkpoints, out, groups)
        check_groups(groups)
    if groups.rank == 0:
        (out / "measured.json").write_text(json.dumps(measured))
    shutdown()


# -- the model against transformers --------------------------------------------------------------------------


def packed_batch(vocab_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [1, T], positions [1, T], cu_seqlens, and a weight for every token's log-prob, [T]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (1, sum(LENGTHS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return tokens, positions, cu_seqlens, torch.randn(sum(LENGTHS), generator=generator)


def run(policy: Policy, batches: list, *, forward_only: bool) -> list[torch.Tensor]:
    """Return the logits [T, vocabulary] of each batch on the last stage. Unless `forward_only`, compute gradients of
    sum(weight * logprob).
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    seen: list[torch.Tensor] = []

    def loss(batch: Any, logits: torch.Tensor, non_loss_data: bool = False) -> Any:
        seen.append(full_logits(policy, logits.detach()))
        if non_loss_data:
            return seen[-1]
        tokens, _, _, weights = batch
        logprobs, _ = token_logprobs(
            logits,
            tokens[0].roll(-1),
            vocab_size=policy.vocab_size,
            tp_group=policy.groups.tp_group,
            chunk_size=9,
        )
        # The schedule divides by the number of micro-batches, and DistributedDataParallel by the number of replicas.
        total = (weights * logprobs).sum() * len(batches) * policy.groups.dp_size
        return total, {}

    def forward_step(batch_iterator: Any, chunk: Any) -> Any:
        batch = next(batch_iterator)
        return forward_packed(chunk, *batch[:3]), partial(loss, batch)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=policy.chunks[0],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return seen


def full_logits(policy: Policy, logits: torch.Tensor) -> torch.Tensor:
    shards = [torch.empty_like(logits) for _ in range(policy.groups.tp_size)]
    dist.all_gather(shards, logits.contiguous(), group=policy.groups.tp_group)
    return torch.cat(shards, -1)[:, : policy.vocab_size]


def check_against_transformers(
    model: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups, out: Path
) -> dict[str, Any]:
    policy = build_policy(model, parallel, groups, update=UpdateConfig(distributed_optimizer=False))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    batches = [packed_batch(policy.vocab_size, seed) for seed in range(4)]  # the same number for each replica

    logits_error = 0.0
    logits = run(
        policy, batches, forward_only=True
    )  # one tensor per batch on the last stage, none on other stages
    for i, (tokens, _, _, weights) in enumerate(batches):
        expected = torch.cat([reference(part).logits[0] for part in tokens.split(LENGTHS, 1)])
        if logits:
            logits_error = max(logits_error, (logits[i] - expected).abs().max().item())
        logprobs = expected.log_softmax(-1).gather(-1, tokens[0].roll(-1)[:, None])[:, 0]
        (weights * logprobs).sum().backward()

    state = checkpoint_tensors(
        {name: p.detach() for name, p in reference.named_parameters()}
    )  # tied weights are counted once
    exported, exact = set(), True
    for name, tensor in iterate_hf_weights(policy):
        exported.add(name)
        exact &= torch.equal(tensor, state[name])
    saved_equal = check_saved(policy, state, out / f"saved-{groups.pp_size}-{groups.tp_size}")
    return {
        "logits_error": max(all_gather_object(logits_error, dist.group.WORLD)),
        "export_exact": all(all_gather_object(exact, dist.group.WORLD)),
        "export_complete": exported == set(state),
        "saved_equal": saved_equal,
        "grad_error": gradient_error(policy, batches, reference),
    }


def check_saved(policy: Policy, state: dict[str, torch.Tensor], folder: Path) -> bool:
    """After save_hf has written the same folder twice, transformers loads the original model from it."""
    for _ in range(2):
        save_hf(policy, str(folder))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    equal = all(
        torch.equal(p, state[name]) and p.dtype == policy.dtype
        for name, p in checkpoint_tensors(dict(loaded.named_parameters())).items()
    )
    dist.barrier()
    if policy.groups.rank == 0:
        equal &= (folder / "tokenizer.json").is_file() and not list(folder.parent.glob(".saved*"))
        shutil.rmtree(folder)
    dist.barrier()
    return equal


def gradient_error(policy: Policy, batches: list, reference: Any) -> float:
    """Return the largest error of any gradient, relative to that gradient's largest entry."""
    policy.chunks[0].zero_grad_buffer()
    run(policy, batches[policy.groups.dp_rank :: policy.groups.dp_size], forward_only=False)
    with torch.no_grad():  # export gradients in the same way as weights
        for parameter in policy.chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    grads = checkpoint_tensors({name: p.grad for name, p in reference.named_parameters()})
    return max(
        ((tensor - grads[name]).abs().max() / grads[name].abs().max()).item()
        for name, tensor in iterate_hf_weights(policy)
    )


def check_bfloat16(checkpoints: Path, parallel: ParallelConfig, groups: ParallelGroups) -> dict[str, Any]:
    """Measure a frozen bfloat16 policy: dtype of its logits, distance to transformers, bit-exact export."""
    model = ModelConfig(path=str(checkpoints / "qwen3"), dtype="bfloat16")
    policy = build_policy(model, parallel, groups, update=None, trainable=False)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16)
    batch = packed_batch(policy.vocab_size, 0)
    with torch.no_grad():
        logits = run(policy, [batch], forward_only=True)
        expected = torch.cat([reference(part).logits[0] for part in batch[0].split(LENGTHS, 1)])
    record = {}
    if logits:
        record = {"dtype": str(logits[0].dtype), "error": (logits[0] - expected).abs().mean().item()}
    state = dict(reference.named_parameters())
    record["export_exact"] = all(torch.equal(t, state[name]) for name, t in iterate_hf_weights(policy))
    assert not any(p.requires_grad for p in policy.chunks[0].parameters())
    return broadcast_object(record, dist.group.WORLD, source=groups.world_size - 1)


# -- log-probs, groups, collectives --------------------------------------------------------------------------


def check_token_logprobs(groups: ParallelGroups) -> dict[str, float]:
    """Return the largest error at TP2 compared with float64, for a padded vocabulary and for a slice of only
    padding.
    """
    errors = {}
    for name, vocab_size, width in (("padded", 250, 128), ("empty slice", 100, 128)):
        generator = torch.Generator().manual_seed(3)
        full = torch.randn(11, width * groups.tp_size, generator=generator) * 4
        targets = torch.randint(0, vocab_size, (11,), generator=generator)
        weight, entropy_weight = torch.randn(2, 11, generator=generator)
        reference = full.double().requires_grad_()
        log_probs = (reference[:, :vocab_size] / 0.7).log_softmax(-1)
        expected = log_probs.gather(-1, targets[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        (weight * expected + entropy_weight * entropy).sum().backward()

        mine = slice(groups.tp_rank * width, (groups.tp_rank + 1) * width)
        full[:, vocab_size:] = float("nan")  # padding must not be read
        logits = full[:, mine].clone().requires_grad_()
        logprobs, found_entropy = token_logprobs(
            logits,
            targets,
            vocab_size=vocab_size,
            tp_group=groups.tp_group,
            temperature=0.7,
            chunk_size=4,
        )
        (weight * logprobs + entropy_weight * found_entropy).sum().backward()
        error = max(
            (logprobs - expected).abs().max().item(),
            (found_entropy - entropy).abs().max().item(),
            (logits.grad - reference.grad[:, mine]).abs().max().item(),
        )
        errors[name] = max(all_gather_object(error, dist.group.WORLD))
    return errors


def check_exchange(groups: ParallelGroups) -> list[list[list[int]]]:
    """Return the lengths and first bytes that each rank received from each rank. Rank 2 sends nothing, and one
    payload is large.
    """

    def payload(source: int, destination: int) -> bytes:
        if source == 2:
            return b""
        return bytes([source, destination]) * (50_000 if (source, destination) == (1, 3) else 1 + destination)

    world = dist.group.WORLD
    everyone = list(range(groups.world_size))
    received = send_bytes([payload(groups.rank, to) for to in everyone], everyone, world)
    assert received == [payload(source, groups.rank) for source in everyone]
    assert send_bytes([b""] * groups.world_size, everyone, world) == [b""] * groups.world_size
    to_two = send_bytes([payload(groups.rank, to) for to in (3, 0)], [3, 0], world)
    expected = [payload(source, groups.rank) if groups.rank in (3, 0) else b"" for source in everyone]
    assert to_two == expected
    for content in (b"", b"from rank 0"):
        assert broadcast_bytes(content if groups.rank == 0 else b"of others", world) == content
    return all_gather_object([[len(part), *part[:2]] for part in received], world)


def check_groups(groups: ParallelGroups) -> None:
    """Check that the record agrees with the process groups in it, and with the records of other ranks."""
    assert (groups.tp_rank, groups.tp_size) == (groups.tp_group.rank(), groups.tp_group.size())
    assert (groups.pp_rank, groups.pp_size) == (groups.pp_group.rank(), groups.pp_group.size())
    assert (groups.dp_rank, groups.dp_size) == (groups.dp_group.rank(), groups.dp_group.size())
    assert (groups.ep_rank, groups.ep_size) == (groups.ep_group.rank(), groups.ep_group.size())
    assert groups.ep_size * groups.edp_group.size() * groups.pp_size == groups.world_size
    replicas = all_gather_object(groups.dp_rank, dist.group.WORLD)
    for index in range(groups.dp_size):
        assert groups.dp_ranks_of(index) == [rank for rank, dp in enumerate(replicas) if dp == index]
    assert [groups.dp_index_of(rank) for rank in range(groups.world_size)] == replicas


def check_refusals(checkpoints: Path, out: Path, groups: ParallelGroups) -> dict[str, str]:
    """Check that every rank refuses a checkpoint without one of its tensors, whichever stage needs that tensor."""
    from safetensors.torch import load_file, save_file

    broken = out / "broken"
    if groups.rank == 0:
        shutil.copytree(checkpoints / "llama", broken)
        weights = load_file(broken / "model.safetensors")
        del weights["model.layers.3.mlp.up_proj.weight"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()
    message = "nothing was raised"
    try:
        model = ModelConfig(path=str(broken), dtype="float32")
        build_policy(model, ParallelConfig(tensor=2, pipeline=2), groups, update=None, trainable=False)
    except ConfigError as error:
        message = str(error)
    assert set(all_gather_object(message, dist.group.WORLD)) == {message}
    return {"missing tensor": message}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
