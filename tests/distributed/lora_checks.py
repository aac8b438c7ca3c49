"""Checks of test_update.py for adapters: gradients, merged weights, training and checkpoints in several layouts.

A check is a function of a `Bench`. It raises AssertionError on the ranks that find a fault.
"""

from __future__ import annotations

import json
import math
import zlib

import torch
from adapters import fill_adapters
from checkpoint_checks import check_resume, save
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from update_bench import Bench, assert_close, hf_weights

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import retention
from a2tgpo.config.lora import LoraConfig
from a2tgpo.model.adapter_files import ADAPTER_FOLDER, iterate_adapters
from a2tgpo.model.lora import is_adapter
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object, world_group
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import compute_gradients

LORA = LoraConfig(rank=6, alpha=9.0)
LINEAR_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def check_adapters(bench: Bench) -> None:
    """Scores, merged weights and gradients equal those of transformers.

    The check gives B values, and subtracts scale x B A from each weight. So the policy with its adapters computes the
    same as the reference. If G is the reference's gradient of a weight, the gradients of A and B are scale x B^T G
    and scale x G A^T.
    """
    policy, _ = bench.policy(lora=LORA)
    fill_adapters(policy)
    take_out(policy)
    expected = load_file(bench.folder / "model" / "model.safetensors")
    assert_close(hf_weights(policy), expected, 1e-6)
    pairs = adapters_of(policy)
    of_base = hf_weights(policy.base)
    names = {name for name, tensor in of_base.items() if not torch.equal(tensor, expected[name])}
    assert names == {f"{name}.weight" for name in pairs} and len(names) == 7 * 4

    batches = bench.batches()
    base_scores = compute_logprobs(policy.base, batches)
    for batch, scored, without in zip(batches, compute_logprobs(policy, batches), base_scores, strict=True):
        for number, index in enumerate(batch.trajectory_indices if scored else ()):
            at = batch.sequence_ids[0] == number
            wanted = bench.reference.logprobs[index][: int(at.sum())] * batch.loss_mask[0, at]
            torch.testing.assert_close(scored.logprobs[at], wanted, rtol=2e-5, atol=2e-5)
        assert scored is None or (scored.logprobs - without.logprobs).abs().max() > 0.1

    sums = compute_gradients(policy, batches, bench.loss_function(batches))
    loss = float(sums["loss over all replicas"])
    assert math.isclose(loss, bench.reference.loss, rel_tol=1e-5), (loss, bench.reference.loss)
    gradients, scale = gradients_of(policy), LORA.scale
    for name, (first, second) in pairs.items():
        whole = bench.reference.gradients[f"{name}.weight"]
        assert_close(
            dict(zip("AB", gradients[name], strict=True)),
            {"A": scale * second.T @ whole, "B": scale * whole @ first.T},
            2e-5,
        )


def check_adapter_update(bench: Bench) -> None:
    """The gradient norm counts every adapter once, and the update lowers the loss."""
    policy, update = bench.policy(lora=LORA, distributed_optimizer=True)
    fill_adapters(policy)
    take_out(policy)
    pairs = adapters_of(policy)
    optimizer, _ = build_optimizer(policy, update, total_steps=10)
    result = bench.step(policy, optimizer)
    squares = 0.0
    for name, (first, second) in pairs.items():
        whole = LORA.scale * bench.reference.gradients[f"{name}.weight"]
        squares += float((second.T @ whole).square().sum() + (whole @ first.T).square().sum())
    assert math.isclose(result.grad_norm, math.sqrt(squares), rel_tol=1e-5), (result.grad_norm, squares)
    assert result.update_ok and bench.step(policy, optimizer).loss < result.loss


def check_resume_adapters(bench: Bench) -> None:
    """A resumed policy with adapters continues bit for bit, and its checkpoint has only the adapters' weights.

    A load is refused if the policy's adapters have other settings, or if its frozen weights are different.
    """
    check_resume(bench, lora=LORA)
    path = bench.folder / "checkpoints" / f"{bench.name}lora" / "step_2"
    for part in ("sharded", "optimizer"):
        names = FileSystemReader(path / part).read_metadata().state_dict_metadata
        assert names and all(is_adapter(name) for name in names), names
    saved = load_file(path / ADAPTER_FOLDER / "adapter_model.safetensors")
    policy, update = bench.policy(lora=LORA)
    checkpoint.load_weights(path, policy)
    found = {name: tensor.clone() for name, tensor in iterate_adapters(policy)}
    assert_close(found, saved, 0)
    assert json.loads((path / ADAPTER_FOLDER / "adapter_config.json").read_text())["r"] == LORA.rank
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    # A checkpoint that was reduced to its weights still has the adapters' files.
    reduced = save(
        bench.folder / "reduced" / bench.name,
        1,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        state={"step": 1},
    )
    if bench.groups.rank == 0:
        retention.reduce_to_weights(reduced)
    torch.distributed.barrier()
    checkpoint.load_weights(reduced, policy)
    assert (reduced / ADAPTER_FOLDER / "adapter_config.json").is_file()
    for other in (None, LoraConfig(rank=6, alpha=8.0)):
        policy, _ = bench.policy(lora=other)
        try:
            checkpoint.load_weights(path, policy)
        except ValueError as error:
            assert "was saved with other adapters, model.lora.rank=6 model.lora.alpha=9.0" in str(error)
        else:
            raise AssertionError("loaded")
    policy, _ = bench.policy(lora=LORA)
    first = next(policy.gpt_models[-1].decoder.parameters())
    if bench.groups.rank == bench.groups.world_size - 1:
        first.data.view(-1)[0] += 1
    try:
        checkpoint.load_weights(path, policy)
    except ValueError as error:
        assert "has adapters of other weights than those now at model.path" in str(error)
    else:
        raise AssertionError("loaded")


def check_resume_adapters_with_buckets(bench: Bench) -> None:
    """A policy whose adapters are gathered in buckets during the forward pass, as on GPUs, resumes bit for bit."""
    check_resume(bench, lora=LORA, bucket_size=600)


def check_resume_adapters_elsewhere(bench: Bench) -> None:
    """Adapters that another layout saved are loaded to the bit."""
    path = bench.folder / "checkpoints" / "dp4lora" / "step_2"
    policy, _ = bench.policy(lora=LORA)
    checkpoint.load_weights(path, policy)
    found = {name: tensor.clone() for name, tensor in iterate_adapters(policy)}
    assert_close(found, load_file(path / ADAPTER_FOLDER / "adapter_model.safetensors"), 0)


def check_fresh_adapters(bench: Bench) -> None:
    """In every layout A begins with the same values, which are equal on all ranks that hold them."""
    policy, _ = bench.policy(lora=LORA)
    found = {name: tensor.clone() for name, tensor in iterate_adapters(policy)}
    for others in all_gather_object(found, world_group()):
        assert_close(others, found, 0)
    values = torch.cat([tensor.flatten() for name, tensor in found.items() if "lora_A" in name])
    digest = zlib.crc32(values.numpy().tobytes())
    path = bench.folder / "fresh_adapters"
    if bench.groups.rank == 0 and not path.exists():
        path.write_text(str(digest))
    torch.distributed.barrier()
    assert path.read_text() == str(digest)


def take_out(policy: Policy) -> None:
    """Subtract every adapter's product from its layer's weight."""
    assert policy.adapters is not None
    for model in policy.gpt_models:
        for layer in model.decoder.layers:
            for part in LINEAR_LAYERS:
                weight = layer.get_submodule(part).weight
                name = f"decoder.layers.{layer.layer_number - 1}.{part}.weight"
                weight.data.sub_(policy.adapters.by_weight[name].delta())


def adapters_of(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B in full, by the projection's name."""
    found = {name: tensor.clone() for name, tensor in iterate_adapters(policy)}
    stems = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found}
    whole = "base_model.model.{}.lora_{}.weight"
    return {stem: (found[whole.format(stem, "A")], found[whole.format(stem, "B")]) for stem in stems}


def gradients_of(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the gradients of A and B in full. They are gathered as if they were the values."""
    assert policy.adapters is not None
    parameters = [p for model in policy.gpt_models for p in model.parameters() if p.requires_grad]
    values = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.clone()  # type: ignore[attr-defined]
    gradients = adapters_of(policy)
    for p, value in zip(parameters, values, strict=True):
        p.data = value
    return gradients
