"""Copy a run's state to host memory in the training thread, and write the checkpoint in another thread.

The writing thread has its own gloo group, so that its collectives cannot mix with those of the training thread. The
ranks exchange their errors at the end of each stage of a save, so that a save fails on all ranks or on none.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from a2tgpo.checkpoint import checked_files
from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.checked_files import Piece
from a2tgpo.checkpoint.optimizer_shards import is_distributed
from a2tgpo.checkpoint.origin import base_of, origin_of
from a2tgpo.checkpoint.sharded_state import OPTIMIZER, WEIGHTS, ShardedCopy, copy_sharded, write_sharded
from a2tgpo.io.atomic_file import folders_beside, naming
from a2tgpo.io.errors import first_line
from a2tgpo.model.adapter_files import adapter_files
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.rng import get_rng_state
from a2tgpo.update.optimizer import LearningRateSchedule


class CheckpointWriter:
    """Saves one checkpoint at a time under `root`. Every rank has one writer and makes the same calls.

    Args:
        root: the folder of the run's checkpoints.
        timeout_s: the longest time, in seconds, that this rank's thread waits for the thread of another rank.
    """

    def __init__(self, root: Path, *, timeout_s: float):
        self._root = root
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._outcome: str | None = None
        self._error: BaseException | None = None
        self.longest_s = 0.0
        """Duration of the longest save so far in seconds. A save lasts from `start` to the end of its thread."""

    @property
    def outcome(self) -> str | None:
        """Result of the current save as `wait` returns it, or None if this rank does not know the result yet."""
        return self._outcome

    def start(
        self,
        step: int,
        *,
        policy: Policy,
        optimizer: Any,
        schedule: LearningRateSchedule,
        state: dict[str, Any],
        own_files: Mapping[str, bytes] = MappingProxyType({}),
        on_complete: Callable[[], None],
    ) -> None:
        """Start to write `root/step_{step}`, and return once the state is copied; every rank must call this.

        Args:
            step: the step in the name of the checkpoint. The save replaces an older checkpoint of the same step.
            state: the caller's own values, which must be equal on all ranks and have JSON types. A load returns
                tuples as lists.
            own_files: files that only this rank adds, as a map from the path within the checkpoint to the content.
                Rank 0 also adds the policy's adapters.
            on_complete: the thread of rank 0 calls this once the checkpoint is complete. If the call raises OSError,
                the save fails.

        Raises:
            TypeError: if `state` contains a type that JSON does not have.
        """
        begin = time.monotonic()
        assert self._thread is None, "one save at a time: wait() for the last one first"
        record = {
            "step": step,
            **origin_of(policy),
            "base": base_of(policy),
            "distributed_optimizer": is_distributed(optimizer),
            "schedule": schedule.state_dict(),
            "state": state,
        }
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        self._outcome = self._error = None
        write = functools.partial(
            self._write,
            step,
            json.dumps(record),
            copy_sharded(policy, optimizer),
            checkpoint.to_plain(get_rng_state()),
            {**own_files, **adapter_files(policy)},
            on_complete,
        )
        # The thread is not a daemon, so that the checkpoint is completed even if the program fails elsewhere.
        self._thread = threading.Thread(target=self._run, args=(write, begin), name="checkpoint")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the current save to end, and return its result; every rank must call this.

        The result is "" if the save succeeded, one line that names the cause if the save failed, and None if no save
        was started. The result is equal on all ranks, unless a rank has died.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        outcome, self._outcome = self._outcome, None
        return outcome

    def _run(self, write: Callable[[], None], begin: float) -> None:
        try:
            write()
            self.longest_s = max(self.longest_s, time.monotonic() - begin)
            self._outcome = ""
        except _SaveFailedError as error:
            self._outcome = str(error)
        except BaseException as error:
            # A bug or a dead rank caused this error. `wait` raises the error in the training thread.
            self._error = error

    def _write(
        self,
        step: int,
        record: str,
        model: ShardedCopy,
        rng: Any,
        own_files: dict[str, bytes],
        on_complete: Callable[[], None],
    ) -> None:
        group = self._group
        assert group is not None, "start() creates the group"
        final = self._root / f"step_{step}"
        partial, _ = folders_beside(final)
        is_first = dist.get_rank(group) == 0

        def make_folders() -> None:
            checkpoint.remove_leftovers(self._root)
            for folder in (WEIGHTS, OPTIMIZER, "rng"):
                (partial / folder).mkdir(parents=True)
            with naming(partial / checkpoint.STATE):
                (partial / checkpoint.STATE).write_text(record)

        def write_own() -> None:
            torch.save(rng, partial / checkpoint.rng_file(dist.get_rank()))
            for name, content in own_files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                with naming(partial / name):
                    (partial / name).write_bytes(content)

        def complete() -> None:
            checkpoint.put_in_place(final, files, pieces)
            on_complete()

        try:
            _together(make_folders if is_first else None, group, partial)
            pieces: dict[str, list[Piece]] = {}
            files: dict[str, tuple[int, int]] = {}

            def write_tensors() -> None:
                pieces.update(write_sharded(partial, model, group))

            def describe() -> None:
                for of_rank in all_gather_object(dict(pieces), group):
                    pieces.update(of_rank)
                others = [name for name in checkpoint.files_of(partial) if name not in pieces]
                files.update(checked_files.describe(partial, others, group))

            _together(write_tensors, group, partial)
            _together(write_own, group, partial)

            _together(describe, group, partial)
            _together(complete if is_first else None, group, final)
        except _SaveFailedError:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)  # free the space, because the disk may be full
            raise


class _SaveFailedError(Exception):
    """A save failed on some rank. The message is one line that names the cause."""


def _together(action: Callable[[], None] | None, group: dist.ProcessGroup, place: Path) -> None:
    """Run `action`, which writes to `place`, unless `action` is None on this rank; every rank of `group` calls this.

    Raises:
        _SaveFailedError: on all ranks, if `action` failed on some rank.
    """
    fault = ""
    try:
        if action is not None:
            action()
    except CheckpointException as error:
        fault = _describe_fault(next(iter(error.failures.values()))[0], place)
    except (OSError, RuntimeError) as error:
        fault = _describe_fault(error, place)
    faults = [text for text in all_gather_object(fault, group) if text]
    if faults:
        raise _SaveFailedError(faults[0])


def _describe_fault(error: BaseException, place: Path) -> str:
    """Describe a write error in one line that names the file, or the folder `place` if the error names no file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename or place})"
    return f"{first_line(error):.200} ({place})"
