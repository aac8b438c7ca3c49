"""Check all ranks before any rank builds a model, so that either all ranks continue or none does.

Each rank inspects its machine, and rank 0 compares the results. If a check fails or a rank does not arrive, all ranks
exit with a code other than 0. Rank 0 prints one line for each rank at fault.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.joining import MAX_LINES, join, open_store, say
from a2tgpo.launch.needs import Needs, disk_faults, existing_folder, training_needs
from a2tgpo.launch.open_files import limit_fault, raise_limit
from a2tgpo.launch.rank_facts import RankFacts, compare, gather_facts, host_memory_faults
from a2tgpo.launch.run_plan import check_memory, plan_of_run
from a2tgpo.launch.search_rate import search_shortfall
from a2tgpo.lifecycle.failure import GRACE_S, ReportedByRank0

if TYPE_CHECKING:
    from torch.distributed import Store

    from a2tgpo.parallel.groups import ParallelGroups
    from a2tgpo.plan.host_memory import HostMemory
    from a2tgpo.plan.plan import Plan

NUM_WORDS = 2
"""Number of messages that rank 0 sends in a meeting. The first message contains rank 0's time and the path of a test
file, and the second contains its decision.
"""
END = "end"
LISTEN_S = 1.0
"""Longest single wait for a message, in seconds. It is short, because a signal cannot interrupt it."""


def start_ranks(config: RunConfig, paths: Mapping[str, str], needs: Needs | None = None) -> ParallelGroups:
    """Check all ranks, then join them as `initialize` does; every rank must call this first.

    Args:
        paths: maps configuration keys to the paths that every rank must be able to read.
        needs: what the program needs from its machines. If None, the needs of a training run apply.

    Raises:
        ReportedByRank0: if a rank failed. Rank 0 has printed the rank and the cause.
        ConfigError: on all ranks, if the plan does not fit the GPUs (`check_memory`).
        RuntimeError: with a one-line message, if this rank cannot reach rank 0.
    """
    raise_limit()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    begin = time.monotonic()
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    meeting = Meeting(store, rank=rank, world_size=world_size, patience_s=config.parallel.start_timeout_s)
    needs = needs or training_needs(config)
    found = meeting.exchange(config, paths, needs)
    plan = _plan_on_gpus(config, world_size)
    warning = plan and check_memory(plan, has_engine=needs.has_engine)
    seconds = time.monotonic() - begin
    groups, seconds_joining = join(config, store, rank=rank, world_size=world_size)
    if rank == 0 and world_size > 1:
        say(_summary(found, seconds + seconds_joining))
    if rank == 0 and warning:
        say(f"warning: {warning}")
    if rank == 0 and plan is not None and needs.has_engine:
        _report_engine(plan)
    return groups


def meet_ranks(config: RunConfig) -> ParallelGroups:
    """Join the ranks of a program that only reads a run, without checking machines; every rank must call this.

    Raises:
        RuntimeError: with a one-line message, if this rank cannot reach rank 0.
    """
    raise_limit()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    groups, _ = join(config, store, rank=rank, world_size=world_size)
    return groups


class Meeting:
    """Collects the facts about all ranks and tells each rank what rank 0 decides. Every wait has a time limit.

    Args:
        store: the store that the ranks share, or None if there is only one rank.
        patience_s: the longest time, in seconds, that rank 0 waits for all ranks to arrive. Rank 0 then waits at
            most as long again for all ranks to check their machines.
    """

    def __init__(self, store: Store | None, *, rank: int, world_size: int, patience_s: float):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._patience_s = patience_s
        self._num_words = 0
        """Number of messages that this rank has sent, if it is rank 0, or received, if it is another rank."""

    def exchange(self, config: RunConfig, paths: Mapping[str, str], needs: Needs) -> list[RankFacts]:
        """Check this rank's machine. Rank 0 returns the facts about all ranks. Any other rank returns only its own
        facts.

        Raises:
            ReportedByRank0: if a rank has a fault.
        """
        if self._rank == 0:
            return self._lead(config, paths, needs)
        self._set(f"here/{self._rank}", platform.node())
        facts = self._look(config, paths, needs, json.loads(self._hear()))
        self._set(f"facts/{self._rank}", json.dumps(dataclasses.asdict(facts)))
        self._hear()
        return [facts]

    def _look(
        self, config: RunConfig, paths: Mapping[str, str], needs: Needs, place: dict[str, Any]
    ) -> RankFacts:
        facts = gather_facts(
            config,
            paths,
            rank=self._rank,
            local_rank=_local_rank(),
            needs_search=needs.has_engine,
            **place,
        )
        if fault := limit_fault(self._world_size):
            facts.faults.append(fault)
        return facts

    def _lead(self, config: RunConfig, paths: Mapping[str, str], needs: Needs) -> list[RankFacts]:
        others = range(1, self._world_size)
        late = self._missing([f"here/{rank}" for rank in others])
        if late:
            seconds = f"{self._patience_s:g} s (parallel.start_timeout_s)"
            self._refuse({rank: [f"did not arrive within {seconds}"] for rank in late})
        folder = existing_folder(Path(config.run.root) / config.run.name)
        marker = folder / f".preflight-{secrets.token_hex(8)}"
        try:
            marker.touch()
        except OSError:
            seen = ""  # the run reports the unwritable folder when it opens the folder
        else:
            seen = str(marker)
        place = {"clock_s": time.time(), "marker": seen}
        try:
            self._say_word(json.dumps(place))
            mine = self._look(config, paths, needs, place)
            silent = self._missing([f"facts/{rank}" for rank in others])
        finally:
            marker.unlink(missing_ok=True)
        if silent:
            self._refuse(
                {
                    rank: [f"on {host}: did not report on its machine within {self._patience_s:g} s"]
                    for rank, host in zip(silent, self._get_all("here", silent), strict=True)
                }
            )
        found = [mine] + [RankFacts(**json.loads(text)) for text in self._get_all("facts", others)]
        mine.faults.extend(disk_faults(needs.disk))
        if needs.has_engine:
            add_search_shortfall(mine, config, self._world_size)
        planned = planned_host_memory(config, self._world_size)
        if causes := compare(found, paths) or (planned and host_memory_faults(found, planned, config)):
            self._refuse(
                {rank: [f"on {found[rank].host}: {'; '.join(faults)}"] for rank, faults in causes.items()}
            )
        first_of = {text: facts for facts in reversed(found) for text in facts.warnings}
        for text, first in first_of.items():
            say(f"warning: rank {first.rank} on {first.host}: {text}")
        self._say_word("go")
        return found

    def _refuse(self, causes: dict[int, list[str]]) -> None:
        for rank, faults in list(causes.items())[:MAX_LINES]:
            say(f"rank {rank} {'; '.join(faults)}")
        more = f"; the first {MAX_LINES} are listed" if len(causes) > MAX_LINES else ""
        say(f"{len(causes)} of {self._world_size} ranks failed{more}; no model was built")
        while self._num_words < NUM_WORDS:
            self._say_word(END)
        self._linger()
        raise ReportedByRank0

    def _linger(self) -> None:
        """Wait until the other ranks have read rank 0's decision, because the store ends when rank 0 ends."""
        from torch.distributed import DistError

        deadline = time.monotonic() + GRACE_S
        while self._store is not None and time.monotonic() < deadline:
            try:
                if self._store.add("left", 0) >= self._world_size - 1:
                    return
            except DistError:
                return
            time.sleep(0.02)

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            self._store.set(key, value)

    def _get_all(self, kind: str, ranks: Iterable[int]) -> list[str]:
        keys = [f"{kind}/{rank}" for rank in ranks]
        return [value.decode() for value in self._store.multi_get(keys)] if self._store and keys else []

    def _say_word(self, word: str) -> None:
        self._set(f"word/{self._num_words}", word)
        self._num_words += 1

    def _hear(self) -> str:
        """Wait for the next message of rank 0, and return the message.

        Raises:
            ReportedByRank0: if the message is `END`.
            RuntimeError: with a one-line message, if rank 0 has ended or does not answer.
        """
        from torch.distributed import DistError, DistStoreError

        assert self._store is not None
        key = f"word/{self._num_words}"
        deadline = time.monotonic() + 2 * self._patience_s + GRACE_S
        while time.monotonic() < deadline:
            try:
                self._store.wait([key], timedelta(seconds=LISTEN_S))
                word = self._store.get(key).decode()
            except DistStoreError:  # no message has come yet; Python handles signals before the next wait
                continue
            except DistError:
                break
            self._num_words += 1
            if word == END:
                self._store.add("left", 1)
                raise ReportedByRank0
            return word
        raise RuntimeError("preflight: rank 0 has ended or does not answer; its own message gives the reason")

    def _missing(self, keys: list[str]) -> list[int]:
        """Wait up to `patience_s` for all `keys`, and return the ranks whose keys are then still missing."""
        from torch.distributed import DistError

        deadline = time.monotonic() + self._patience_s
        missing = []
        for key in keys:
            assert self._store is not None
            try:
                self._store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except DistError:
                missing.append(key)
        return [int(key.rpartition("/")[2]) for key in missing]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def add_search_shortfall(facts: RankFacts, config: RunConfig, world_size: int) -> None:
    """Add a fault or a warning to `facts` if torch sees a GPU and the search server is too slow for the plan."""
    import torch

    if not torch.cuda.is_available() or facts.faults:
        return
    line, is_refused = search_shortfall(config, num_gpus=world_size)
    if line:
        (facts.faults if is_refused else facts.warnings).append(line)


def planned_host_memory(config: RunConfig, world_size: int) -> list[HostMemory]:
    """Return each rank's host memory according to the plan; an empty list if there is no GPU or no plan."""
    try:
        plan = _plan_on_gpus(config, world_size)
    except ConfigError:
        return []
    return plan.host_by_rank if plan else []


def _plan_on_gpus(config: RunConfig, world_size: int) -> Plan | None:
    """Return the plan of `config` on the GPUs that torch sees, or None if torch sees no GPU.

    Raises:
        ConfigError: with a one-line message, if torch sees a GPU and the layout is impossible.
    """
    import torch

    return plan_of_run(config, num_gpus=world_size)[0] if torch.cuda.is_available() else None


def _report_engine(plan: Plan) -> None:
    from a2tgpo.plan.advice import cache_shortage
    from a2tgpo.plan.report import share_text

    say(
        f"each engine takes {share_text(plan)}, for {plan.geometry.full_sequences} sequences of full length or "
        f"{plan.geometry.concurrent} of mean length at a time"
    )
    if shortage := cache_shortage(plan):
        say(f"warning: {shortage}")


def _summary(found: list[RankFacts], seconds: float) -> str:
    hosts = len({facts.host for facts in found})
    card = found[0].equal.get("GPU", "no GPU")
    skew = max(abs(facts.clock_ahead_s) for facts in found)
    return (
        f"{len(found)} ranks on {hosts} machine{'s' * (hosts > 1)}, {card}: versions, files and configuration agree, "
        f"clocks within {skew:.2g} s, first all-reduce correct; {seconds:.1f} s"
    )
