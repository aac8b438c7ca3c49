"""What each phase keeps in GPU memory, with a real policy and optimizer in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2tgpo.batch.packing import pack
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.memory import offload
from a2tgpo.memory.offload import MovablePart, gradient_tensors, optimizer_tensors, weight_tensors
from a2tgpo.memory.phases import GIB, MemoryPhases
from a2tgpo.memory.residency import ENGINE, PHASES, TRAINER, resident
from a2tgpo.memory.snapshots import MemorySnapshots
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.model.fingerprint import weights_fingerprint
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import train_step

NUM_STEPS = 3
STEP = ("bank", "refit", "rollout", "score", "update")


class LoggingEngine:
    """Stands in for an engine on a GPU. It can sleep only if both its parts are awake."""

    def __init__(self) -> None:
        self.awake = {"weights", "kv_cache"}
        self.log: list[str] = []

    def sleep(self) -> None:
        assert self.awake == {"weights", "kv_cache"}, "half an engine cannot sleep"
        self.awake = set()
        self.log.append("engine sleeps")

    def wake(self, part: str) -> None:
        assert part not in self.awake
        self.awake.add(part)
        self.log.append(f"{part} wakes")

    def is_on_card(self, part: str) -> bool:
        return part in self.awake


@dataclasses.dataclass
class Trainer:
    """The tensors that phases move, and a step that changes all of them."""

    policy: Policy
    optimizer: Any
    reference: Policy
    batch: Any

    def step(self) -> float:
        mask = self.batch.loss_mask[0]
        loss = lambda number, logprobs, entropy: (-logprobs[mask].sum(), {})  # noqa: E731
        result = train_step(self.policy, self.optimizer, [self.batch], loss)
        assert result.update_ok and result.grad_norm > 0
        return result.loss

    def phases(self, engine: LoggingEngine | None = None, **options: Any) -> MemoryPhases:
        phases = MemoryPhases(self.policy, optimizer=self.optimizer, reference=self.reference, **options)
        if engine is not None:
            phases.build_engine(lambda: engine)
        return phases

    def tensors(self, part: str) -> list[torch.Tensor]:
        return {
            "weights": lambda: weight_tensors(self.policy),
            "gradients": lambda: gradient_tensors(self.policy),
            "optimizer": lambda: optimizer_tensors(self.policy, self.optimizer),
            "reference": lambda: weight_tensors(self.reference),
        }[part]()

    def is_on_card(self, part: str) -> bool:
        sizes = {tensor.untyped_storage().nbytes() > 0 for tensor in self.tensors(part)}
        assert len(sizes) == 1, f"{part}: neither here nor there"
        return sizes.pop()


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.fixture
def make(policy, trajectories):
    """Return a function that builds a trainer with the same model as `policy` but its own weights."""
    model = ModelConfig(path=policy.path, dtype="float32")

    def trainer(dtype: str = "bfloat16", *, distributed_optimizer: bool = True) -> Trainer:
        update = UpdateConfig(lr=1e-2, distributed_optimizer=distributed_optimizer)
        mine = dataclasses.replace(model, dtype=dtype)
        built = build_policy(mine, ParallelConfig(), policy.groups, update=update)
        return Trainer(
            policy=built,
            optimizer=build_optimizer(built, update, total_steps=9)[0],
            reference=build_policy(mine, ParallelConfig(), policy.groups, update=None, trainable=False),
            batch=pack(trajectories, [0, 1, 2], align=built.alignment),
        )

    return trainer


def test_every_phase_holds_what_the_table_says_and_counts_it(make) -> None:
    trainer, engine = make(), LoggingEngine()
    trainer.step()
    phases = trainer.phases(engine)
    for phase in ("refit", "rollout", "score", "update", "checkpoint", "bank", "build", "refit", "rollout"):
        phases.enter(phase)
        wanted = resident(phase, offload=True)
        assert {part for part in TRAINER if trainer.is_on_card(part)} == wanted & set(TRAINER), phase
        assert engine.awake == {
            tag for part, tag in zip(ENGINE, ("weights", "kv_cache"), strict=True) if part in wanted
        }
    metrics = phases.take_metrics().values()
    parameters = sum(p.numel() for chunk in trainer.policy.chunks for p in chunk.parameters())
    held = {
        phase: metrics[f"memory/{phase}_trainer_gib"] * GIB / parameters
        for phase in PHASES
        if phase != "start"
    }
    # bytes a parameter: bfloat16 weights, float32 gradients, float32 weights and two moments; buffers are padded
    for phase, expected in {
        "rollout": 0,
        "bank": 2,
        "refit": 2,
        "score": 4,
        "checkpoint": 14,
        "update": 18,
    }.items():
        assert held[phase] == pytest.approx(expected, rel=0.02), phase
    assert metrics["memory/update_used_gib"] > 0.05 and metrics["memory/move_s"] > 0
    assert phases.take_metrics().values() == {"memory/moved_gib": 0.0, "memory/move_s": 0.0}


def test_room_is_made_before_it_is_taken_in_one_order(make, monkeypatch) -> None:
    trainer, engine = make(), LoggingEngine()
    trainer.step()
    phases = trainer.phases(engine)
    for verb in ("leave", "come_back"):
        move = getattr(MovablePart, verb)

        def logged(part: MovablePart, verb: str = verb, move: Any = move) -> int:
            (name,) = [name for name, known in phases._parts.items() if known is part]
            engine.log.append(f"{name} {verb}")
            return move(part)

        monkeypatch.setattr(MovablePart, verb, logged)
    moves = {}
    for phase in ("refit", "rollout", "score", "update", "bank", "refit"):
        engine.log.clear()
        phases.enter(phase)
        moves[phase] = list(engine.log)
    assert moves == {
        "rollout": ["weights leave", "kv_cache wakes"],
        "score": ["engine sleeps", "weights come_back", "reference come_back"],
        "update": ["reference leave", "optimizer come_back", "gradients come_back"],
        "bank": ["gradients leave", "optimizer leave"],
        "refit": ["weights wakes"],
    }


@pytest.mark.parametrize(
    ("dtype", "distributed_optimizer"),
    [("bfloat16", True), ("bfloat16", False), ("float32", True), ("float32", False)],
)
def test_training_between_phases_is_training_without_them_to_the_bit(
    make, monkeypatch, dtype, distributed_optimizer
) -> None:
    monkeypatch.setattr(offload, "PAGE_BYTES", 1000)  # storages extend over several pages
    still = make(dtype, distributed_optimizer=distributed_optimizer)
    moved = make(dtype, distributed_optimizer=distributed_optimizer)
    phases = moved.phases(LoggingEngine())
    reference = copies(still.tensors("reference"))
    for _ in range(NUM_STEPS):
        for phase in (*STEP[:-1], "checkpoint", "update"):
            phases.enter(phase)
        assert moved.step() == still.step()
    phases.enter("bank")
    phases.enter("build")
    for part in ("weights", "optimizer"):
        assert len(moved.tensors(part)) == len(still.tensors(part))
        for mine, theirs in zip(moved.tensors(part), still.tensors(part), strict=True):
            assert torch.equal(mine, theirs), part
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors("reference"), reference, strict=True))
    assert all(not tensor.any() for tensor in moved.tensors("gradients")), "gradients come back as zeros"
    buffer = moved.policy.chunks[0].buffers[0]
    if distributed_optimizer:  # and the views are still views
        assert buffer.param_data.untyped_storage()._cdata in {
            p.untyped_storage()._cdata for p in moved.policy.chunks[0].parameters()
        }


@given(order=st.lists(st.sampled_from([phase for phase in PHASES if phase != "start"]), max_size=12))
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_any_order_is_either_refused_unmoved_or_keeps_every_bit(make, order) -> None:
    trainer = _SHARED.setdefault("trainer", make())
    if not trainer.tensors("gradients")[0].any():
        trainer.step()
    before = {part: copies(trainer.tensors(part)) for part in ("weights", "optimizer", "reference")}
    engine = LoggingEngine()
    phases = trainer.phases(engine)
    for phase in order:
        was = phases.phase
        is_allowed = (
            phase == was
            or (phase == "rollout" and was in ("refit", "start"))
            or phase == "refit"
            or (phase != "rollout" and was != "refit")
        )
        if is_allowed:
            phases.enter(phase)
            assert phases.phase == phase
        else:
            with pytest.raises(RuntimeError, match=rf"memory phase {phase} cannot follow {was}"):
                phases.enter(phase)
            assert phases.phase == was
        wanted = resident(phases.phase, offload=True)
        assert all(trainer.is_on_card(part) == (part in wanted) for part in TRAINER)
    if phases.phase == "refit":
        phases.enter("rollout")
    phases.enter("build")
    for part, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, trainer.tensors(part), strict=True)), part


_SHARED: dict[str, Trainer] = {}


class Ends(MemorySnapshots):
    """Records the phases that it is told about. Real snapshots need a GPU."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def end_of(self, phase: str) -> None:
        self.seen.append(phase)


def test_snapshots_see_the_end_of_every_phase_of_a_step(make) -> None:
    phases, ends = make().phases(LoggingEngine()), Ends()
    with phases.observed_by(ends):
        for phase in ("bank", "refit", "rollout", "rollout", "score", "update"):
            phases.enter(phase)
    phases.enter("checkpoint")
    assert ends.seen == ["start", "bank", "refit", "rollout", "score", "update"]


def test_without_offload_the_trainer_stays_and_the_engine_still_sleeps(make) -> None:
    trainer, engine = make(), LoggingEngine()
    trainer.step()
    phases = trainer.phases(engine, offload=False)
    for phase in ("refit", "rollout", "score", "update"):
        phases.enter(phase)
        assert all(trainer.is_on_card(part) for part in TRAINER)
    assert engine.awake == set()
    assert phases.take_metrics().values()["memory/moved_gib"] == 0


def test_what_is_moved_past_the_phases_is_noticed(make) -> None:
    trainer, engine = make(), LoggingEngine()
    phases = trainer.phases(engine)
    phases.enter("refit")
    phases.enter("rollout")
    phases.enter("score")
    engine.awake = {"kv_cache"}
    with pytest.raises(
        RuntimeError, match=r"memory phase score: KV cache is on the card; allowed: off the card"
    ):
        phases.enter("update")
    engine.awake = set()
    MovablePart(lambda: trainer.tensors("weights")).leave()
    with pytest.raises(RuntimeError, match=r"memory phase score: weights are off the card"):
        phases.enter("update")


def test_work_without_what_it_needs_is_refused(make) -> None:
    trainer = make()
    phases = trainer.phases(LoggingEngine())
    for read in (
        lambda: compute_logprobs(trainer.policy, [trainer.batch]),
        lambda: weights_fingerprint(trainer.policy),
        trainer.step,
    ):
        with pytest.raises(RuntimeError, match="off the card; enter"):
            read()
    phases.enter("score")
    assert compute_logprobs(trainer.policy, [trainer.batch])[0] is not None
    with pytest.raises(RuntimeError, match="the gradients are off the card; enter memory phase update"):
        trainer.step()


def test_the_process_does_not_grow_over_many_rounds(make) -> None:
    trainer = make()
    trainer.step()
    phases = trainer.phases(LoggingEngine())
    used = []
    for _ in range(12):
        for phase in STEP:
            phases.enter(phase)
        used.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert max(used[4:]) <= used[3] * 1.02
