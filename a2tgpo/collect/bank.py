"""Store finished rollouts on disk until a checkpoint covers their step, so that a crash does not lose the rollouts.

The file `bank/step_N/replica_R.bin` contains the rollout of step N by engine R. The engine's first rank writes the
file, and all ranks of the engine read it.

A restarted run uses the stored rollouts only if they match its step, its exact weights and its rollout configuration.
The files of all engines must also come from the same attempt at the step. Otherwise all ranks play the step again.
On a GPU, a repeated update may give slightly different weights, so often only the first step after the checkpoint
matches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import msgspec

from a2tgpo.collect.carried_pool import Carried
from a2tgpo.collect.state import RolloutSnapshot, RolloutState
from a2tgpo.collect.step import PlayedStep
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import file_digests
from a2tgpo.io.atomic_file import atomic_file
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.fingerprint import weights_fingerprint
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object, gather_object, world_group
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory, decode_records, encode_records

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step_(\d+)")
_DIGEST_BYTES = 32


class RankShare(msgspec.Struct, frozen=True):
    """The part of an engine's stored step that belongs to one rank."""

    key: str
    """Step number, and fingerprints of the rank's own weights and of the configuration."""
    metrics: MetricSums


class BankedStep(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's rollout of a step."""

    attempt: str
    """Name of the attempt at the step, equal on all ranks. Another attempt may train on other groups."""
    ranks: list[RankShare]
    """The part of the rollout that each rank of the engine has, in rank order."""
    trajectories: list[Trajectory]
    sampler: dict[str, Any]
    carried: Carried


class RolloutBank:
    """Store the rollouts of a step for a restart after a crash. Every rank must make the same calls.

    Args:
        folder: the folder `bank/` of the run.
        state: the state that `put` stores with the rollouts and that `take` restores.
        questions: fingerprint of the questions, answers and records (`PromptSet.content_fingerprint`).
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        state: RolloutState,
        groups: ParallelGroups,
        engine_group: EngineGroup,
        *,
        questions: str = "",
    ):
        self._folder = folder
        self._config_key = _config_key(config, [state.sampler.fingerprint, questions], groups)
        self._state = state
        self._is_first_rank = groups.rank == 0
        self._engine_group = engine_group
        self._key = ""
        self._attempt = ""

    def take(self, step: int, policy: Policy) -> PlayedStep | None:
        """Return the stored rollouts of `step`, or None if the caller must play the step.

        Rollouts are returned only if `policy`'s weights played them. The weights must be on the GPU. With the
        rollouts, `take` restores the state that `put` stored. Only the leader of each engine gets trajectories.
        """
        self._key = f"step {step}, weights {weights_fingerprint(policy)} {self._config_key}"
        banked = self._read(step)
        world = world_group()
        found = all_gather_object((banked.attempt if banked else None, uuid.uuid4().hex), world)
        if banked is None or any(attempt != banked.attempt for attempt, _ in found):
            self._attempt = found[0][1]
            return None
        if self._is_first_rank:
            logger.warning("step %d continues with its rollouts from an earlier start", step)
        self._state.restore(RolloutSnapshot(sampler=banked.sampler, carried=banked.carried))
        return PlayedStep(
            trajectories=banked.trajectories if self._engine_group.is_leader else [],
            metrics=banked.ranks[self._engine_group.rank].metrics,
        )

    def put(self, step: int, played: PlayedStep) -> None:
        """Store the rollouts that the caller played because `take` returned None.

        If a reward could not judge a rollout, nothing is stored, so that the next start calls the reward again. If
        the write fails, the metric `rollout/not_banked` counts the failure, and the run continues with a warning.
        """
        share, group = RankShare(self._key, played.metrics), self._engine_group.group
        ranks = gather_object(share, group) if group else [share]
        has_all_rewards = all(one.reward_error is None for t in played.trajectories for one in t.played)
        if not (self._engine_group.is_leader and has_all_rewards):
            return
        state = self._state.snapshot()
        banked = BankedStep(
            attempt=self._attempt,
            ranks=ranks,
            trajectories=played.trajectories,
            sampler=state.sampler,
            carried=state.carried,
        )
        payload = encode_records(banked)
        path = self._path(step)
        try:
            with atomic_file(path) as stream:
                stream.write(_digest(payload) + payload)
        except OSError as error:
            played.metrics.add("rollout/not_banked", 1, 0)
            logger.warning("could not bank the rollouts of step %d: %s (%s)", step, error.strerror, path)

    def _read(self, step: int) -> BankedStep | None:
        path = self._path(step)
        try:
            content = path.read_bytes()
        except OSError:
            self._say_if_earlier_version(path.parent, step)
            return None
        payload = content[_DIGEST_BYTES:]
        if content[:_DIGEST_BYTES] != _digest(payload):
            logger.warning("skipping %s: it is damaged", path)
            return None
        try:
            banked = decode_records(payload, BankedStep)
        except (msgspec.DecodeError, RecursionError):
            logger.warning("skipping %s: it was written by another version", path)
            return None
        place = self._engine_group.rank
        return banked if place < len(banked.ranks) and banked.ranks[place].key == self._key else None

    def _say_if_earlier_version(self, folder: Path, step: int) -> None:
        """Warn if `folder` has files of an earlier version of the program, which wrote one file per rank."""
        if self._is_first_rank and any(folder.glob("rank_*.bin")):
            logger.warning(
                "skipping %s, written by an earlier version: step %d is played again",
                folder,
                step,
            )

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step}" / f"replica_{self._engine_group.index}.bin"


def drop_covered(folder: Path, step: int) -> None:
    """Remove the rollouts of all steps up to `step`. A checkpoint must cover them. Only one rank may call this."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(entry.name)
        if match and int(match[1]) <= step:
            shutil.rmtree(entry, ignore_errors=True)


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()


def _config_key(config: RunConfig, questions: list[str], groups: ParallelGroups) -> str:
    """Return a fingerprint of the settings, questions and layout on which an engine's rollouts may depend."""
    sections = dataclasses.asdict(config)
    for name in ("run", "guard", "watchdog", "evaluation", "checkpoint", "warmstart", "refit", "profile"):
        del sections[name]
    values = [sections, file_digests(config), config.run.seed, questions, groups.rank, groups.world_size]
    text = json.dumps(values, sort_keys=True)
    return f"config {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
