"""Checks of checkpoints for test_update.py: resuming in any layout, older formats, retention, host memory."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, filesystem
from update_bench import Bench, assert_close, hf_weights

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import retention, sharded_state
from a2tgpo.checkpoint.sharded_state import (
    OPTIMIZER,
    WEIGHTS,
    copy_sharded,
    copy_state,
    load_sharded,
    model_shards,
    sharding_metadata,
    write_part,
    write_sharded,
)
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.config.update import ExtrapolationConfig
from a2tgpo.memory.offload import optimizer_tensors, weight_tensors
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import LearningRateSchedule, build_optimizer

from storage_tally import StorageTally  # isort: skip  (found by what update_bench adds to the path)


def save(root: Path, step: int, **what: Any) -> Path:
    """Write a complete checkpoint, and return its path."""
    writer = CheckpointWriter(root, timeout_s=60)
    writer.start(step, **what, on_complete=lambda: None)
    assert writer.wait() == ""
    return root / f"step_{step}"


PLAIN = ExtrapolationConfig()


def check_resume(bench: Bench, *, config: ExtrapolationConfig = PLAIN, **options: Any) -> None:
    """A policy that was saved, loaded and trained further equals a policy that never stopped, bit for bit."""
    root = bench.folder / "checkpoints" / (bench.name + "".join(options))
    options = {"distributed_optimizer": True, **options}
    policy, update = bench.policy(**options)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    extrapolation = Extrapolation(config)
    two_updates(bench, policy, optimizer, schedule, extrapolation)
    state = {"step": 2, "sampler": {"position": 7, "order": [3, 1, 2]}, "best": 0.1 + 0.2}
    state["extrapolation_gate"] = extrapolation.gate.state_dict()
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    path = save(root, 2, **parts, state=state)
    drawn = (torch.rand(3).tolist(), random.random())
    measured = two_updates(bench, policy, optimizer, schedule, extrapolation)
    expected = hf_weights(policy)

    policy, update = bench.policy(**options)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    extrapolation = Extrapolation(config)
    torch.manual_seed(99)
    assert checkpoint.latest(root) == path
    assert checkpoint.load(path, policy=policy, optimizer=optimizer, schedule=schedule) == state
    extrapolation.gate.load_state_dict(state["extrapolation_gate"])
    assert (torch.rand(3).tolist(), random.random()) == drawn
    assert two_updates(bench, policy, optimizer, schedule, extrapolation) == measured
    assert_close(hf_weights(policy), expected, 0)
    if bench.groups.rank == 0:
        torch.save(expected, root / "after_two_more.pt")
    dist.barrier()


def two_updates(
    bench: Bench, policy: Policy, optimizer: Any, schedule: LearningRateSchedule, extrapolation: Extrapolation
) -> list[tuple[float, dict[str, float]]]:
    """Make two updates, extrapolated if possible. Return the learning rates and the metrics of the extrapolation."""
    found = []
    for _ in range(2):
        rate, batches = schedule.lr, bench.batches()
        if extrapolation.is_ready(schedule):
            losses = (bench.loss_function(batches), bench.loss_function(batches))
            extrapolation.step(policy, optimizer, batches, losses)
        else:
            bench.step(policy, optimizer, batches)
        schedule.step()
        found.append((rate, extrapolation.take_metrics(num_updates=1).values()))
    return found


def check_resume_with_buckets(bench: Bench) -> None:
    """The same holds with gradients in several buckets, each padded at its end."""
    check_resume(bench, bucket_size=3000)


def check_resume_bfloat16(bench: Bench) -> None:
    """The same holds in bfloat16, with float32 weights in the optimizer."""
    check_resume(bench, dtype="bfloat16")


def check_resume_whole_optimizer(bench: Bench) -> None:
    """The same holds with the whole optimizer state on every rank. A distributed optimizer refuses this state in one
    line.
    """
    check_resume(bench, distributed_optimizer=False)
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    path = bench.folder / "checkpoints" / "dp4distributed_optimizer" / "step_2"
    try:
        checkpoint.load(path, policy=policy, optimizer=optimizer, schedule=schedule)
    except ValueError as error:
        assert "was saved with update.distributed_optimizer=false" in str(error)
    else:
        raise AssertionError("loaded")


PIECE = 4096
"""Size of a piece in bytes: some 20 rows of a matrix of this model."""
SAVED_ELSEWHERE = {
    "tp2_pp2": ["dp4", "dp4bucket_size"],
    "pp2_vpp2": ["dp4"],
    "pp2": ["pp2_vpp2"],
    "tp2_cp2_sequence": ["cp2", "pp2_vpp2"],
}


def check_another_layout(bench: Bench) -> None:
    """Training continues from a checkpoint of another layout. The optimizer state is the same, so the weights are
    close.
    """
    for saved in SAVED_ELSEWHERE[bench.name]:
        policy, update = bench.policy(distributed_optimizer=True)
        optimizer, schedule = build_optimizer(policy, update, total_steps=6)
        root = bench.folder / "checkpoints" / saved
        with captured_warnings() as lines:
            checkpoint.load(root / "step_2", policy=policy, optimizer=optimizer, schedule=schedule)
        # Virtual stages do not change the places of the ranks, so their random states are restored.
        expected = 0 if bench.groups.rank > 0 or (saved, bench.name) == ("pp2_vpp2", "pp2") else 1
        assert sum("another layout" in line for line in lines) == expected, lines
        for _ in range(2):
            bench.step(policy, optimizer)
            schedule.step()
        # Adam magnifies rounding errors, so updated weights of two layouts are close, but not equal.
        assert_close(hf_weights(policy), torch.load(root / "after_two_more.pt"), 1e-3)


def check_values_of_another_layout(bench: Bench) -> None:
    """If a checkpoint of four data-parallel ranks is loaded and saved again, every value is the same, to the bit."""
    check_values_again(bench, bench.folder / "checkpoints" / "dp4dtype" / "step_2")


def check_earlier_format_of_another_layout(bench: Bench) -> None:
    """The same holds for a checkpoint whose optimizer state was gathered on every rank."""
    check_values_again(bench, bench.folder / "checkpoints" / "earlier_dp4_bfloat16")


def check_values_again(bench: Bench, saved: Path, *, dtype: str = "bfloat16") -> None:
    policy, optimizer = built(bench, dtype=dtype)
    load_sharded(saved, policy, optimizer)
    again = write(bench, f"{saved.parent.name}_{saved.name}_{bench.name}", copy_sharded(policy, optimizer))
    if bench.groups.rank == 0:
        assert_same_values(read_all(again), read_all(saved))
    dist.barrier()


def check_earlier_format(bench: Bench) -> None:
    """Training continues bit for bit from a checkpoint of the earlier format, whose optimizer state was gathered on
    every rank.
    """
    for dtype in ("float32", "bfloat16"):
        policy, optimizer = stepped(bench, dtype=dtype)
        models = model_shards(policy)
        gathered = optimizer.sharded_state_dict(dict(models), metadata=sharding_metadata(policy))
        earlier = write(
            bench,
            f"earlier_{bench.name}_{dtype}",
            copy_state({**models, "optimizer": gathered}, policy),
            together=True,
        )
        now = write(bench, f"now_{bench.name}_{dtype}", copy_sharded(policy, optimizer))
        if bench.groups.rank == 0:
            old, new = read_all(earlier), read_all(now)
            # The earlier format has float32 weights twice.
            dropped = {key for key in old if key.startswith("optimizer.state.param.")}
            assert old.keys() - new.keys() == (dropped if dtype == "float32" else set())
            assert_same_values(new, {key: old[key] for key in new})
        dist.barrier()
        resumed, its_optimizer = built(bench, dtype=dtype)
        load_sharded(earlier, resumed, its_optimizer)
        for one, its in ((policy, optimizer), (resumed, its_optimizer)):
            bench.step(one, its)
        assert_close(hf_weights(resumed), hf_weights(policy), 0)


def check_host_memory(bench: Bench) -> None:
    """On the host, a save needs memory for the rank's own share, and a load for one piece. Megatron's own code needs
    memory for the whole state.
    """
    policy, optimizer = stepped(bench)
    own = sum(tensor.nbytes for tensor in optimizer_tensors(policy, optimizer))
    weights = [tensor.nbytes for tensor in weight_tensors(policy)]

    saving = StorageTally()
    with mock.patch.object(sharded_state, "PIECE_BYTES", PIECE), saving:
        copy = copy_sharded(policy, optimizer)
    kept = held_bytes(copy.tensors)
    gathering = StorageTally()
    with gathering:
        models = model_shards(policy)
        optimizer.sharded_state_dict(dict(models), metadata=sharding_metadata(policy))

    folder = write(bench, "host_memory", copy)
    read: dict[torch.dtype, list[int]] = {torch.float32: [], torch.bfloat16: []}

    def load(*arguments: Any, torch_load: Any = torch.load, **options: Any) -> Any:
        loaded = torch_load(*arguments, **options)
        if isinstance(loaded, Tensor):
            read[loaded.dtype].append(loaded.nbytes)
        return loaded

    loading = StorageTally()
    with mock.patch.object(filesystem.torch, "load", load), loading:
        load_sharded(folder, policy, optimizer)

    # The ranks divide the weights by whole tensors.
    share = own + sum(weights) / bench.groups.dp_size + max(weights)
    assert kept <= saving.peak_bytes <= share, (kept, saving.peak_bytes, share)
    assert gathering.peak_bytes > 4 * share, "the count is blind"
    assert max(read[torch.float32]) <= PIECE and sum(read[torch.float32]) == own, read
    # If several ranks have the same weights, only one of them reads the weights.
    read_here = sum(read[torch.bfloat16])
    assert max(read[torch.bfloat16]) <= max(weights) and read_here <= share - own, read
    assert sum(all_gather_object(read_here, bench.groups.dp_cp_group)) == sum(weights)
    # Megatron concatenates gate and up projections on the device of the weights.
    assert loading.peak_bytes < sum(weights), loading.peak_bytes


def check_retention(bench: Bench) -> None:
    """The newest checkpoints are kept, leftovers are removed, and damaged checkpoints are skipped."""
    root = bench.folder / "checkpoints" / "retention"
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    assert checkpoint.latest(root) is None
    bench.step(policy, optimizer)
    for step in (1, 2, 10):
        if bench.groups.rank == 0:
            for leftover in (".step_7.unfinished", ".step_7.replaced", "step_7.tmp", "step_7.old"):
                (root / leftover).mkdir(parents=True)
        dist.barrier()
        save(root, step, **parts, state={"step": step})
        if bench.groups.rank == 0:
            retention.drop_old(root, keep=2, keep_every=0, keep_gb=0, spare=None)
        dist.barrier()
    assert sorted(p.name for p in root.iterdir()) == ["step_10", "step_2"]

    def newest(damage: Callable[[Path], None]) -> tuple[Path | None, list[str]]:
        dist.barrier()
        if bench.groups.rank == 0:
            shutil.copytree(root / "step_10", root / "step_11")
            damage(root / "step_11")
        dist.barrier()
        with captured_warnings() as lines:
            found = checkpoint.latest(root)
            assert found is not None
            found, _ = checkpoint.load_newest(found, **parts)
        with contextlib.suppress(ValueError):
            checkpoint.load(root / "step_11", **parts)
            raise AssertionError("a damaged checkpoint was loaded")
        dist.barrier()
        if bench.groups.rank == 0:
            shutil.rmtree(root / "step_11")
        return found, lines

    def flip_a_byte(path: Path) -> None:
        target = max(path.glob("sharded/*.distcp"), key=lambda file: file.stat().st_size)
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)

    damages = {
        "damaged": flip_a_byte,
        "missing": lambda path: next(path.glob("sharded/*.distcp")).unlink(),
        "was interrupted": lambda path: (path / checkpoint.MARKER).unlink(),
        "complete.json is damaged": lambda path: (path / checkpoint.MARKER).write_text("{"),
    }
    for reason, damage in damages.items():
        found, lines = newest(damage)
        assert found == root / "step_10", (reason, found)
        if bench.groups.rank == 0:
            assert len(lines) == 1 and "step_11" in lines[0] and reason in lines[0], lines
        else:
            assert not lines


def built(bench: Bench, *, dtype: str = "bfloat16") -> tuple[Policy, Any]:
    """Return a policy and its distributed optimizer."""
    policy, update = bench.policy(distributed_optimizer=True, dtype=dtype)
    return policy, build_optimizer(policy, update, total_steps=6)[0]


def stepped(bench: Bench, *, dtype: str = "bfloat16") -> tuple[Policy, Any]:
    """Return a policy and its distributed optimizer after an update."""
    policy, optimizer = built(bench, dtype=dtype)
    bench.step(policy, optimizer)
    return policy, optimizer


def write(bench: Bench, name: str, copy: Any, *, together: bool = False) -> Path:
    """Write the tensors of a checkpoint. If `together`, put weights and optimizer into one folder, as in the earlier
    format.
    """
    folder = bench.folder / "checkpoints" / name
    if bench.groups.rank == 0:
        for part in (WEIGHTS,) if together else (WEIGHTS, OPTIMIZER):
            (folder / part).mkdir(parents=True)
    dist.barrier()
    assert dist.group.WORLD is not None
    if together:
        write_part(folder / WEIGHTS, copy, dist.group.WORLD)
    else:
        write_sharded(folder, copy, dist.group.WORLD)
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint in full."""
    found: dict[str, Tensor] = {}
    for part in (path for path in (folder / WEIGHTS, folder / OPTIMIZER) if path.is_dir()):
        entries = FileSystemReader(part).read_metadata().state_dict_metadata
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
        torch_checkpoint.load(state, storage_reader=FileSystemReader(part), no_dist=True)
        assert not found.keys() & state.keys()
        found |= state
    return found


def assert_same_values(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that the values are equal to the bit, apart from rows that a layout adds to make the vocabulary
    divisible.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, tensor in found.items():
        rows = min(len(tensor), len(expected[key]))
        assert torch.equal(tensor[:rows], expected[key][:rows]), key


def held_bytes(tensors: dict[str, Any]) -> int:
    """Return the bytes of the tensors that a rank is about to write."""
    total = 0
    for value in tensors.values():
        if hasattr(value, "local_shards"):
            total += sum(shard.tensor.nbytes for shard in value.local_shards())
        else:
            total += sum(shard._sh_ten.data.nbytes for shard in getattr(value, "_local_shards", [value]))
    return total


@contextlib.contextmanager
def captured_warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    checkpoint.logger.propagate = False
    try:
        yield lines
    finally:
        checkpoint.logger.removeHandler(handler)
        checkpoint.logger.propagate = True
