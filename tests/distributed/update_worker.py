"""What each of the 4 ranks of test_update.py runs: all checks in one launch, results to FOLDER/results.json.

    torchrun --nproc-per-node 4 update_worker.py FOLDER

A check is a function of a `Bench`; it raises AssertionError on the ranks that see a fault. Every rank runs every
check to its end or to its fault; a rank that is left waiting in a collective is freed by the time-out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from a2tgpo.batch.balance import deal, microbatches
from a2tgpo.batch.packing import PackedBatch, alignment, pack, packed_length
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import build_policy
from a2tgpo.model.policy import Policy
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.collectives import all_gather_object, broadcast_object
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.trajectory import Trajectory, Turn
from a2tgpo.update import checkpoint
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.score import score
from a2tgpo.update.train_step import LossFunction, StepResult, compute_gradients, train_step

VOCAB = 199
LAYOUTS = {
    "dp4": ParallelConfig(timeout_s=60),
    "tp2": ParallelConfig(tensor=2, timeout_s=60),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, timeout_s=60),
    "pp2": ParallelConfig(pipeline=2, timeout_s=60),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2, timeout_s=60),
}


def make_trajectories() -> list[Trajectory]:
    """Nine of different shapes, among them one without a sampled token and one that ends with an observation."""
    rng = random.Random(5)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    rollouts = []
    for index in range(9):
        turns = [
            Turn(tokens=tokens(1, 9), rollout_logprobs=[], observation_tokens=tokens(1, 12))
            for _ in range(index % 4)
        ]
        turns.append(Turn(tokens=tokens(0, 0) if index == 4 else tokens(2, 9), rollout_logprobs=[]))
        if index == 6:
            turns.pop()
        if index == 4:
            turns = [Turn(tokens=[], rollout_logprobs=[], observation_tokens=tokens(3, 5))]
        for turn in turns:
            turn.rollout_logprobs = [0.0] * len(turn.tokens)
        rollouts.append(
            Trajectory(
                prompt_index=0,
                prompt_id=str(index),
                sample_index=index,
                prompt_tokens=tokens(2, 15),
                turns=turns,
                stop_reason="answer",
            )
        )
    return rollouts


def coefficient(trajectory: int, turn: int) -> float:
    """Stands in for a turn's advantage: different for every turn, of both signs."""
    return math.sin(1.0 + 3.0 * trajectory + 0.7 * turn)


@dataclasses.dataclass
class Reference:
    """Loss and gradients by transformers, one unpacked trajectory at a time, and each token's log-prob."""

    loss: float
    gradients: dict[str, Tensor]
    logprobs: dict[int, Tensor]
    """Per trajectory, log p of its tokens 1 .. m."""


def make_reference(path: Path, trajectories: list[Trajectory]) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    total = sum(t.num_sampled_tokens for t in trajectories)
    loss, logprobs = torch.zeros(()), {}
    for index, rollout in enumerate(trajectories):
        if not rollout.num_sampled_tokens:
            continue
        ids, weights = list(rollout.prompt_tokens), [0.0] * len(rollout.prompt_tokens)
        for number, turn in enumerate(rollout.turns):
            ids += turn.tokens + turn.observation_tokens
            weights += [coefficient(index, number)] * len(turn.tokens) + [0.0] * len(turn.observation_tokens)
        logits = model(torch.tensor([ids])).logits[0, :-1]
        found = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        loss = loss - (found * torch.tensor(weights[1:])).sum() / total
        logprobs[index] = found.detach()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Reference(loss=loss.item(), gradients=gradients, logprobs=logprobs)


class Bench:
    """A layout in place, with the trajectories dealt to this rank's replica."""

    def __init__(self, folder: Path, name: str, trajectories: list[Trajectory], reference: Reference) -> None:
        self.folder, self.name, self.parallel = folder, name, LAYOUTS[name]
        self.trajectories, self.reference = trajectories, reference
        self.groups: ParallelGroups = initialize(self.parallel, seed=3)
        self.total_tokens = sum(t.num_sampled_tokens for t in trajectories)

    def policy(self, *, distributed_optimizer: bool = False, **options: Any) -> tuple[Policy, UpdateConfig]:
        update = UpdateConfig(
            distributed_optimizer=distributed_optimizer,
            **{"lr": 1e-2, "weight_decay": 0.1, "lr_schedule": "linear", **options},
        )
        model = ModelConfig(path=str(self.folder / "model"), dtype="float32")
        return build_policy(model, self.parallel, self.groups, update=update), update

    def batches(self, *, max_tokens: int = 60, replicas: int | None = None) -> list[PackedBatch]:
        """This replica's micro-batches, the trajectories dealt over the first `replicas` replicas."""
        lengths = [packed_length(t) for t in self.trajectories]
        dealt = deal(lengths, replicas or self.groups.dp_size)
        mine = [index for index, replica in enumerate(dealt) if replica == self.groups.dp_rank]
        grouped = microbatches([lengths[index] for index in mine], max_tokens)
        align = alignment(self.parallel)
        return [pack(self.trajectories, [mine[i] for i in group], align=align) for group in grouped]

    def loss_function(self, batches: list[PackedBatch]) -> LossFunction:
        def loss(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch = batches[number]
            turns = zip(batch.turn_trajectory.tolist(), batch.turn_index.tolist(), strict=True)
            weights = batch.expand_turns(torch.tensor([coefficient(*turn) for turn in turns]))
            mask = batch.loss_mask[0]
            metrics = {"tokens": mask.sum(), "entropy": entropy[mask].sum()}
            return -(logprobs * weights).sum() / self.total_tokens, metrics

        return loss

    def step(self, policy: Policy, optimizer: Any, batches: list[PackedBatch] | None = None) -> StepResult:
        batches = self.batches() if batches is None else batches
        return train_step(policy, optimizer, batches, self.loss_function(batches))


def hf_gradients(policy: Policy) -> dict[str, Tensor]:
    """Gradients in the model's buffers under Hugging Face names, in full: exported as if they were the weights."""
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.clone()
    gradients = hf_weights(policy)
    for p, weight in zip(parameters, weights, strict=True):
        p.data = weight
    return gradients


def hf_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_hf_weights(policy)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the expected one, relative to its norm; 0: equal to the bit."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in found.items():
        error = float((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"
        assert tolerance > 0 or torch.equal(tensor, expected[name]), f"{name} is not equal to the bit"


# -- checks on every layout ----------------------------------------------------------------------------------


def check_gradients(bench: Bench) -> None:
    """Loss and gradients are those of transformers on single trajectories, however they are packed and dealt."""
    policy, _ = bench.policy()
    ways = [(1, None), (60, None), (10_000, None), (60, 1)]
    for max_tokens, replicas in ways if bench.name == "dp4" else ways[2:]:
        batches = bench.batches(max_tokens=max_tokens, replicas=replicas)
        counts = all_gather_object(len(batches), bench.groups.dp_group)
        assert replicas is None or bench.groups.dp_size == 1 or 0 in counts, (
            "no replica is without trajectories"
        )
        sums = compute_gradients(policy, batches, bench.loss_function(batches))
        loss = float(sums["loss over all replicas"])
        assert math.isclose(loss, bench.reference.loss, rel_tol=1e-5), (loss, bench.reference.loss)
        tokens = all_gather_object(int(sums.get("tokens", torch.tensor(0))), bench.groups.dp_group)
        assert sum(tokens) == bench.total_tokens, (tokens, bench.total_tokens)
        assert_close(hf_gradients(policy), bench.reference.gradients, 1e-5)


def check_scores(bench: Bench) -> None:
    """Log-probs are those of transformers, on the last stage only; weights and mode are left as they were."""
    policy, _ = bench.policy()
    batches = bench.batches()
    scores = score(policy, batches)
    assert len(scores) == len(batches) and all(chunk.training for chunk in policy.chunks)
    for batch, scored in zip(batches, scores, strict=True):
        assert (scored is not None) == bench.groups.is_pipeline_last
        if scored is None:
            continue
        assert scored.logprobs.shape == scored.entropy.shape == (batch.num_tokens,)
        for number, index in enumerate(batch.trajectory_indices):
            found = scored.logprobs[batch.sequence_ids[0] == number]
            expected = bench.reference.logprobs[index][: found.numel()]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check_nan_is_skipped(bench: Bench) -> None:
    """A NaN on one replica leaves weights and optimizer state of all ranks as if the step had not been."""
    results = {}
    for with_nan in (False, True):
        policy, update = bench.policy(distributed_optimizer=True)
        optimizer, _ = build_optimizer(policy, update, total_steps=10)
        bench.step(policy, optimizer)
        if with_nan:
            batches = bench.batches()
            sound = bench.loss_function(batches)

            def broken(number: int, logprobs: Tensor, entropy: Tensor, sound: Any = sound) -> Any:
                loss, metrics = sound(number, logprobs, entropy)
                return loss * (math.nan if bench.groups.dp_rank == bench.groups.dp_size - 1 else 1), metrics

            before = hf_weights(policy)
            result = train_step(policy, optimizer, batches, broken)
            assert not result.update_ok and math.isnan(result.loss) and math.isnan(result.grad_norm)
            assert_close(hf_weights(policy), before, 0)
        assert bench.step(policy, optimizer).update_ok
        results[with_nan] = hf_weights(policy)
    assert_close(results[True], results[False], 0)


def check_resume(bench: Bench) -> None:
    """Saved, loaded into a fresh policy and continued: equal to the bit to never having stopped."""
    root = bench.folder / "checkpoints" / bench.name
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    for _ in range(2):
        bench.step(policy, optimizer)
        schedule.step()
    state = {"step": 2, "sampler": {"position": 7, "order": [3, 1, 2]}, "best": 0.1 + 0.2}
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    path = checkpoint.save(root, 2, **parts, state=state, keep=2)
    drawn = (torch.rand(3).tolist(), random.random())
    rates = []
    for _ in range(2):
        rates.append(schedule.lr)
        bench.step(policy, optimizer)
        schedule.step()
    expected = hf_weights(policy)

    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    torch.manual_seed(99)
    assert checkpoint.latest(root) == path
    assert checkpoint.load(path, policy=policy, optimizer=optimizer, schedule=schedule) == state
    assert (torch.rand(3).tolist(), random.random()) == drawn
    for rate in rates:
        assert schedule.lr == rate
        bench.step(policy, optimizer)
        schedule.step()
    assert_close(hf_weights(policy), expected, 0)
    if bench.groups.rank == 0:
        torch.save(expected, bench.folder / f"after_resume_{bench.name}.pt")
    dist.barrier()


# -- checks on one layout ------------------------------------------------------------------------------------


def check_data_parallel_updates(bench: Bench) -> None:
    """Three updates of a sharded optimizer give the weights and norms that one replica with all the data gives."""
    outcomes = {}
    for replicas in (1, 4):
        policy, update = bench.policy(distributed_optimizer=True, clip_grad=0.05)
        optimizer, _ = build_optimizer(policy, update, total_steps=10)
        batches = bench.batches(replicas=replicas)
        results = [bench.step(policy, optimizer, batches) for _ in range(3)]
        outcomes[replicas] = ([r.grad_norm for r in results], hf_weights(policy))
    expected_norm = math.sqrt(sum(float(g.norm()) ** 2 for g in bench.reference.gradients.values()))
    norms, weights = outcomes[4]
    assert math.isclose(norms[0], expected_norm, rel_tol=1e-5), (norms[0], expected_norm)
    assert norms[0] > 0.05, "gradients are not clipped: the check is blind to it"
    for found, expected in zip(norms, outcomes[1][0], strict=True):
        assert math.isclose(found, expected, rel_tol=1e-4), (norms, outcomes[1][0])
    assert_close(weights, outcomes[1][1], 1e-4)


def check_retention(bench: Bench) -> None:
    """The newest checkpoints are kept, leftovers go, and one that has been damaged is passed over."""
    root = bench.folder / "checkpoints" / "retention"
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    assert checkpoint.latest(root) is None
    bench.step(policy, optimizer)
    for step in (1, 2, 10):
        if bench.groups.rank == 0:
            (root / "step_7.tmp").mkdir(parents=True)
        dist.barrier()
        checkpoint.save(root, step, **parts, state={"step": step}, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["step_10", "step_2"]

    def newest(damage: Callable[[Path], None]) -> tuple[Path | None, list[str]]:
        dist.barrier()
        if bench.groups.rank == 0:
            shutil.copytree(root / "step_10", root / "step_11")
            damage(root / "step_11")
        dist.barrier()
        with captured_warnings() as lines:
            found = checkpoint.latest(root)
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
        "not written to the end": lambda path: (path / checkpoint.MARKER).unlink(),
        "complete.json is damaged": lambda path: (path / checkpoint.MARKER).write_text("{"),
    }
    for reason, damage in damages.items():
        found, lines = newest(damage)
        assert found == root / "step_10", (reason, found)
        if bench.groups.rank == 0:
            assert len(lines) == 1 and "step_11" in lines[0] and reason in lines[0], lines
        else:
            assert not lines


def check_another_layout(bench: Bench) -> None:
    """A checkpoint of 4 data-parallel ranks goes on at TP2 x PP2: same optimizer state, so close weights."""
    policy, update = bench.policy(distributed_optimizer=True)
    optimizer, schedule = build_optimizer(policy, update, total_steps=6)
    path = bench.folder / "checkpoints" / "dp4" / "step_2"
    with captured_warnings() as lines:
        checkpoint.load(path, policy=policy, optimizer=optimizer, schedule=schedule)
    assert bench.groups.rank > 0 or "another layout" in lines[0], lines
    for _ in range(2):
        bench.step(policy, optimizer)
        schedule.step()
    # Adam turns rounding into steps of its own; the updates so far moved weights by about 2e-1 of their norm.
    assert_close(hf_weights(policy), torch.load(bench.folder / "after_resume_dp4.pt"), 1e-2)


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


CHECKS: dict[str, list[Callable[[Bench], None]]] = {
    "dp4": [
        check_gradients,
        check_scores,
        check_nan_is_skipped,
        check_resume,
        check_data_parallel_updates,
        check_retention,
    ],
    "tp2": [check_gradients],
    "tp2_sequence": [check_gradients, check_scores],
    "pp2": [check_gradients, check_scores, check_nan_is_skipped],
    "tp2_pp2": [check_gradients, check_scores, check_nan_is_skipped, check_resume, check_another_layout],
}


def run_check(check: Callable[[Bench], None], bench: Bench) -> str:
    """Empty where the check holds on every rank, else what the first failing rank says."""
    try:
        check(bench)
        fault = ""
    except Exception as error:
        fault = f"rank {bench.groups.rank}: {type(error).__name__}: {error}"
    assert dist.group.WORLD is not None
    return next(filter(None, all_gather_object(fault, dist.group.WORLD)), "")


def make_model(path: Path) -> None:
    torch.manual_seed(11)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)


def leave() -> None:
    """End the process group; the next one meets at a new port, since keys of this one stay in its store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert dist.group.WORLD is not None
    os.environ["MASTER_PORT"] = str(broadcast_object(port, dist.group.WORLD, source=0))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    shutdown()


def main(folder: Path) -> None:
    start = time.perf_counter()
    trajectories, results = make_trajectories(), {}
    rank = initialize(ParallelConfig(timeout_s=60), seed=3).rank
    if rank == 0:
        make_model(folder / "model")
    leave()
    reference = make_reference(folder / "model", trajectories)
    for name, checks in CHECKS.items():
        bench = Bench(folder, name, trajectories, reference)
        for check in checks:
            key = f"{check.__name__.removeprefix('check_')}[{name}]"
            results[key] = run_check(check, bench)
            if rank == 0:
                print(f"{time.perf_counter() - start:6.1f}s {key} {results[key] or 'ok'}", flush=True)
        leave()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
