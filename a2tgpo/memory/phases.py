"""Move trainer and engine to and from the GPU, according to the table of phases in `memory/residency.py`.

When the phase changes, parts leave the GPU first. Then torch's allocator frees its cache, and other parts come back.
Before and after each change, an error is raised if a part is not where the table says.

Every change adds these metrics, with the new phase as PHASE. Each metric is the largest value over all ranks:

`memory/PHASE_trainer_gib` is the size of the trainer's state on the GPU.
`memory/PHASE_used_gib` is all memory in use on the GPU. Without a GPU it is the process's resident memory.
`memory/PHASE_allocated_gib` is the memory of torch's tensors, only with a GPU.
`memory/PHASE_reserved_gib` also includes the cache of torch's allocator, only with a GPU.
`memory/PHASE_peak_gib` is the peak of the allocated memory in PHASE, here the phase that ends, only with a GPU.

Two metrics are sums over all phase changes of a step, averaged over ranks. `memory/moved_gib` is the data copied to
and from the host, and `memory/move_s` is the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from a2tgpo.memory.offload import MovablePart, gradient_tensors, optimizer_tensors, weight_tensors
from a2tgpo.memory.residency import ENGINE, TRAINER, resident
from a2tgpo.memory.shortage import shortage_line
from a2tgpo.memory.snapshots import MemorySnapshots
from a2tgpo.metrics.host_memory import resident_bytes
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy

ON_GPU = torch.cuda.is_available()
GIB = 2**30
_MOVED, _SECONDS = "memory/moved_gib", "memory/move_s"
_LEAVING = ("gradients", "optimizer", "reference", "weights")
_COMING = ("weights", "reference", "optimizer", "gradients")
_TAGS = {"engine weights": "weights", "KV cache": "kv_cache"}
"""The engine's name for each of its parts, in the order in which the parts wake."""


class Engine(Protocol):
    """The methods of an engine that the phases call."""

    def sleep(self) -> None: ...

    def wake(self, part: str) -> None: ...

    def is_on_card(self, part: str) -> bool: ...


EngineType = TypeVar("EngineType", bound=Engine)


class MemoryPhases:
    """Move a rank's state to where each phase needs it. The first phase is `build`.

    Every rank must make the same calls. At construction, policy, optimizer and reference are entirely on the GPU.

    Args:
        optimizer: None if nothing is trained.
        reference: None if the run has no reference. The reference `policy.base` has no weights of its own, so it
            moves with `policy`.
        engine: an engine that is asleep. None if the run has no engine, or if `build_engine` builds the engine later.
        offload: the setting `update.offload`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        optimizer: Any = None,
        reference: Policy | None = None,
        engine: Engine | None = None,
        offload: bool = True,
    ) -> None:
        self._parts = {
            "weights": MovablePart(partial(weight_tensors, policy)),
            "gradients": MovablePart(partial(gradient_tensors, policy), keeps_values=False),
        }
        if optimizer is not None:
            self._parts["optimizer"] = MovablePart(partial(optimizer_tensors, policy, optimizer))
        if reference is not None and not reference.is_base:
            self._parts["reference"] = MovablePart(partial(weight_tensors, reference))
        self._engine = engine
        self._offload = offload
        self._metrics = MetricSums()
        self._snapshots: MemorySnapshots | None = None
        self.phase = "build"
        """The current phase, one of `residency.PHASES`."""
        self._check()

    def enter(self, phase: str) -> None:
        """Move every part to where `phase` needs it. If `phase` is already the current phase, move nothing.

        Raises:
            RuntimeError: with a one-line message, if `phase` cannot follow the current phase or a part is misplaced.
        """
        self._check()
        if phase == self.phase:
            return
        self._check_order(phase)
        wanted = self._wanted(phase)
        if self._snapshots is not None:
            self._snapshots.end_of(self.phase)
        start = time.perf_counter()
        if ON_GPU:
            self._metrics.add_max(f"memory/{self.phase}_peak_gib", torch.cuda.max_memory_allocated() / GIB)
            torch.cuda.reset_peak_memory_stats()
        moved = self._free(wanted)
        self.phase = phase
        moved += self._allocate(wanted)
        self._check()
        self._record(moved, time.perf_counter() - start)

    def build_engine(self, build: Callable[[], EngineType]) -> EngineType:
        """Free the trainer's GPU memory, then call `build` and return the awake engine that it creates."""
        assert self._engine is None and self.phase == "build", "one engine, before anything else"
        self._free(self._wanted("start"))
        self.phase = "start"
        with self.explain_shortage():
            self._engine = engine = build()
        self._check()
        return engine

    @contextmanager
    def observed_by(self, snapshots: MemorySnapshots) -> Iterator[None]:
        """Call `snapshots.end_of` whenever a phase ends in the `with` block, and when the block itself ends."""
        self._snapshots = snapshots
        try:
            yield
            snapshots.end_of(self.phase)
        finally:
            self._snapshots = None

    @contextmanager
    def explain_shortage(self) -> Iterator[None]:
        """If the GPU runs out of memory in the `with` block, raise a RuntimeError that says so in one line.

        The line names the phase, what is on the GPU, and the settings that help.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._shortage(str(error))) from error

    def take_metrics(self) -> MetricSums:
        """Return the metrics of all phase changes since the last call. The caller must reduce them over all ranks."""
        taken, self._metrics = self._metrics, MetricSums()
        for name in (_MOVED, _SECONDS):
            taken.add(name, 0.0, 1)  # one sample per rank: the mean is over ranks, not over changes
        return taken

    def _wanted(self, phase: str) -> frozenset[str]:
        held = set(self._parts) | (set(ENGINE) if self._engine is not None else set())
        return resident(phase, offload=self._offload) & held

    def _check_order(self, phase: str) -> None:
        before, after = self._wanted(self.phase), self._wanted(phase)
        if phase == "start":
            raise RuntimeError("memory phase start is only for building the engine; enter refit")
        if "engine weights" in after - before and phase != "refit":
            raise RuntimeError(
                f"memory phase {phase} cannot follow {self.phase}: the waking engine has no weights; enter "
                "refit first"
            )
        if self.phase == "refit" and "KV cache" not in after and self._engine is not None:
            raise RuntimeError(
                f"memory phase {phase} cannot follow refit: a half-woken engine cannot sleep; enter rollout first"
            )

    def _free(self, wanted: frozenset[str]) -> int:
        moved = 0
        for name in _LEAVING:
            if name in self._parts and name not in wanted and not self._parts[name].is_away():
                moved += self._parts[name].leave()
        engine = self._engine
        if engine is not None and any(
            engine.is_on_card(tag) for name, tag in _TAGS.items() if name not in wanted
        ):
            engine.sleep()
        if ON_GPU:
            # The engine's own allocator cannot use memory that torch's allocator keeps in its cache.
            torch.cuda.empty_cache()
        return moved

    def _allocate(self, wanted: frozenset[str]) -> int:
        moved = 0
        for name in _COMING:
            if name in wanted and not self._parts[name].is_resident():
                moved += self._parts[name].come_back()
        if self._engine is not None:
            for name, tag in _TAGS.items():
                if name in wanted and not self._engine.is_on_card(tag):
                    self._engine.wake(tag)
        return moved

    def _check(self) -> None:
        """Raise RuntimeError unless every part is where the table says."""
        wanted = self._wanted(self.phase)
        for name, part in self._parts.items():
            if not (part.is_resident() if name in wanted else part.is_away()):
                self._misplaced(name, name in wanted)
        if self._engine is not None:
            for name, tag in _TAGS.items():
                if self._engine.is_on_card(tag) != (name in wanted):
                    self._misplaced(name, name in wanted)

    def _misplaced(self, name: str, is_wanted: bool) -> None:
        place, allowed = ("off", "on") if is_wanted else ("on", "off")
        raise RuntimeError(
            f"memory phase {self.phase}: {name} {'is' if name == 'KV cache' else 'are'} {place} the card; "
            f"allowed: {allowed} the card. Something moved them without MemoryPhases.enter"
        )

    def _shortage(self, message: str) -> str:
        parts = {name: self._parts[name].bytes_on_card() for name in TRAINER if name in self._parts}
        held: dict[str, int | None] = {name: size for name, size in parts.items() if size}
        if self._engine is not None:
            held |= {name: None for name, tag in _TAGS.items() if self._engine.is_on_card(tag)}
        in_use = memory_in_use()
        total = torch.cuda.mem_get_info()[1] if ON_GPU else in_use["used"]
        return shortage_line(message, phase=self.phase, resident=held, in_use=in_use, total=total)

    def _record(self, moved: int, seconds: float) -> None:
        self._metrics.add(_MOVED, moved / GIB, 0)
        self._metrics.add(_SECONDS, seconds, 0)
        trainer = sum(self._parts[name].bytes_on_card() for name in TRAINER if name in self._parts)
        seen = {"trainer": trainer} | memory_in_use()
        for what, size in seen.items():
            self._metrics.add_max(f"memory/{self.phase}_{what}_gib", size / GIB)


def memory_in_use() -> dict[str, int]:
    """Return the memory in use, in bytes. Without a GPU, return only the resident memory of this process."""
    if not ON_GPU:
        return {"used": resident_bytes()}
    free, total = torch.cuda.mem_get_info()
    return {
        "used": total - free,
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
    }
