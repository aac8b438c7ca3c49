"""The parts of a run that its folder saves and restores, in one process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import build_model

from a2tgpo.assemble import build_checkpoints
from a2tgpo.checkpoint.best import BEST_FILE
from a2tgpo.collect.state import RolloutState
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.guard import GuardConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.config.run import CheckpointConfig, RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import ExtrapolationConfig, UpdateConfig
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.model.build import build_policy
from a2tgpo.parallel.engine_group import ALONE
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.run.folder import RunFolder
from a2tgpo.trajectory import Prompt
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import build_optimizer

GATE = ExtrapolationConfig(horizon=5, window=3, warmup=1)


def scores(em: float, *, error: float = 0.0) -> dict[str, float]:
    values = {"em": em, "em_format_gated": em / 2, "f1": 1 - em}
    return values | {f"standard_error_{name}": error for name in values}


def best_of(root: Path) -> dict | None:
    path = root / BEST_FILE
    return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A process group of one process, and the parts of a run that a checkpoint contains, before any update."""
    environment = dict(os.environ)
    groups = initialize(ParallelConfig(), seed=0)
    yield SimpleNamespace(groups=groups, parts=new_parts(groups, tmp_path_factory.mktemp("model")))
    shutdown()
    os.environ.clear()
    os.environ.update(environment)


def new_parts(groups: ParallelGroups, model: Path, *, vocab_size: int = 250) -> SimpleNamespace:
    """Write a random model to `model`, and return the parts of a run with this model."""
    build_model("llama", vocab_size=vocab_size).save_pretrained(model)
    update = UpdateConfig()
    policy = build_policy(
        ModelConfig(path=str(model), dtype="float32"), ParallelConfig(), groups, update=update
    )
    optimizer, schedule = build_optimizer(policy, update, total_steps=100)
    return SimpleNamespace(
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        phases=MemoryPhases(policy, optimizer=optimizer),
        state=RolloutState(sampler=PromptSampler(10, 2, seed=0, fingerprint="q")),
        train_prompts=Questions("q"),
        test_sets=Questions("t"),
        groups=groups,
        engine_group=ALONE,
    )


class Questions:
    """A replacement of a question set, in which every prompt is [1, 2]."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def prompts(self, indices: list[int]) -> list[Prompt]:
        return [
            Prompt(index=i, id=f"q{index}", question="who?", answers=("a",), tokens=(1, 2))
            for i, index in enumerate(indices)
        ]


class Run:
    """The objects of one run between its start and its end."""

    def __init__(
        self,
        world: SimpleNamespace,
        root: Path,
        *,
        resume: str = "auto",
        accept_changes: bool = False,
        name: str = "r",
        keep: int = 1,
        keep_every: int = 0,
        keep_rollouts_gb: float = 0.0,
        keep_gb: float = 0,
        keep_previous: int = 0,
        partial: PartialConfig = PartialConfig(),  # noqa: B008 (frozen)
        **rollout: Any,
    ):
        self.config = RunConfig(
            run=RunSettings(name=name, root=str(root), keep_rollouts_gb=keep_rollouts_gb),
            model=ModelConfig(path="unused"),
            data=DataConfig(train="unused", test="unused"),
            search=SearchConfig(corpus="unused"),
            rollout=RolloutConfig(partial=partial, **rollout),
            algorithm=AlgorithmConfig(
                correction=CorrectionConfig(kind="mask"), entropy_coef=0.005, entropy_target=0.2
            ),
            update=UpdateConfig(extrapolation=GATE),
            checkpoint=CheckpointConfig(
                keep=keep,
                keep_every=keep_every,
                keep_gb=keep_gb,
                keep_previous=keep_previous,
                max_failures=2,
            ),
        )
        self.parts: Any = SimpleNamespace(
            **vars(world.parts),
            config=self.config,
            entropy_weight=EntropyWeight(self.config.algorithm),
            extrapolation=Extrapolation(self.config.update.extrapolation),
        )
        self.folder = RunFolder(self.config, world.groups)
        self.guards = Guards(GuardConfig(stop_after=1), clip_low=0.1, clip_high=0.1)
        checkpoint = self.folder.open(resume, accept_changes=accept_changes)
        self.saver = build_checkpoints(self.parts, self.folder, self.guards)
        self.step = self.saver.restore(checkpoint, is_auto=resume == "auto")
        self.checkpoints = self.folder.path / "checkpoints"

    def save(self, step: int, em: float | None = None) -> None:
        if em is not None:
            self.saver.best.offer(step, scores(em))
        self.saver.save(step)
        self.saver.finish_saving()

    @property
    def steps(self) -> list[int]:
        return sorted(
            int(p.name.removeprefix("step_")) for p in self.checkpoints.glob("step_*") if not p.suffix
        )

    @property
    def best_step(self) -> int | None:
        record = best_of(self.checkpoints)
        return record["step"] if record else None
