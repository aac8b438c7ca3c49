"""Before any model is built: every rank looks at its machine, rank 0 compares and tells once, all go on or none does.

`start_ranks` meets over torch's TCP store, compares facts (launch/rank_facts.py), makes the plan, joins the process
group and sums over all ranks. Whatever fails, and whoever does not come, all ranks end with an exit code that is not
0, and rank 0 prints one line for each rank that is to blame.
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

from a2tgpo.config.check import ConfigError
from a2tgpo.config.run import RunConfig
from launch.failure import GRACE_S, ToldByRank0
from launch.joining import MAX_LINES, join, open_store, say
from launch.needs import Needs, disk_faults, existing_folder, training_needs
from launch.open_files import limit_fault, raise_limit
from launch.rank_facts import RankFacts, compare, gather_facts, host_memory_faults
from launch.run_plan import plan_of_run
from launch.search_rate import search_shortfall

if TYPE_CHECKING:
    from torch.distributed import Store

    from a2tgpo.parallel.groups import ParallelGroups
    from a2tgpo.plan.host_memory import HostMemory
    from a2tgpo.plan.plan import Plan

NUM_WORDS = 2
"""That rank 0 says in a meeting: where to look, and whether to go on."""
END = "end"
LISTEN_S = 1.0
"""Of one wait for a word, which no signal interrupts."""
PLAN_MARGIN = 0.1
"""A plan this share above a card's memory is let through: no plan has been held against a card yet."""


def start_ranks(config: RunConfig, paths: Mapping[str, str], needs: Needs | None = None) -> ParallelGroups:
    """Check all ranks, then join them as `initialize` does; every rank calls this, first.

    Args:
        paths: by configuration key, what every rank must be able to read.
        needs: what the program takes of the machines; None: what a training run does.

    Raises:
        ToldByRank0: a rank failed; rank 0 has said which and why.
        ConfigError: the plan does not fit, on all ranks alike.
        RuntimeError: one line; rank 0 cannot be reached from here.
    """
    raise_limit()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    begin = time.monotonic()
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    meeting = Meeting(store, rank=rank, world_size=world_size, patience_s=config.parallel.start_timeout_s)
    needs = needs or training_needs(config)
    found = meeting.exchange(config, paths, needs)
    plan = check_plan(config, world_size, needs)
    seconds = time.monotonic() - begin
    groups, seconds_joining = join(config, store, rank=rank, world_size=world_size)
    if rank == 0 and world_size > 1:
        say(_summary(found, seconds + seconds_joining))
    if rank == 0 and plan is not None and needs.has_engine:
        _tell_engine(plan)
    return groups


def meet_ranks(config: RunConfig) -> ParallelGroups:
    """Join the ranks without a look at their machines, for what only reads a run; every rank calls this, first.

    Raises:
        RuntimeError: one line; rank 0 cannot be reached from here.
    """
    raise_limit()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    groups, _ = join(config, store, rank=rank, world_size=world_size)
    return groups


class Meeting:
    """Where ranks bring their facts, and hear rank 0's verdict. No wait is without an end.

    Args:
        store: None for a rank that is alone.
        patience_s: longest wait for the last rank to come, and again to look at its machine.
    """

    def __init__(self, store: Store | None, *, rank: int, world_size: int, patience_s: float):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._patience_s = patience_s
        self._num_words = 0
        """Of rank 0 so far: said by it, heard by the others."""

    def exchange(self, config: RunConfig, paths: Mapping[str, str], needs: Needs) -> list[RankFacts]:
        """The facts of all ranks on rank 0, and this one's elsewhere, if all is well."""
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
            asks_search=needs.has_engine,
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
            self._refuse({rank: [f"did not come within {seconds}"] for rank in late})
        folder = existing_folder(Path(config.run.root) / config.run.name)
        marker = folder / f".preflight-{secrets.token_hex(8)}"
        try:
            marker.touch()
        except OSError:
            seen = ""  # that it cannot be written is told when it is opened
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
                    rank: [f"on {host}: did not look at its machine within {self._patience_s:g} s"]
                    for rank, host in zip(silent, self._get_all("here", silent), strict=True)
                }
            )
        found = [mine] + [RankFacts(**json.loads(told)) for told in self._get_all("facts", others)]
        mine.faults.extend(disk_faults(needs.disk))
        if needs.has_engine:
            add_search_shortfall(mine, config, self._world_size)
        planned = planned_host_memory(config, self._world_size)
        if causes := compare(found, paths) or (planned and host_memory_faults(found, planned, config)):
            self._refuse(
                {rank: [f"on {found[rank].host}: {'; '.join(told)}"] for rank, told in causes.items()}
            )
        first_of = {text: facts for facts in reversed(found) for text in facts.warnings}
        for text, first in first_of.items():
            say(f"warning: rank {first.rank} on {first.host}: {text}")
        self._say_word("go")
        return found

    def _refuse(self, causes: dict[int, list[str]]) -> None:
        for rank, told in list(causes.items())[:MAX_LINES]:
            say(f"rank {rank} {'; '.join(told)}")
        more = f", of which {MAX_LINES} are named" if len(causes) > MAX_LINES else ""
        say(f"{len(causes)} of {self._world_size} ranks failed{more}; nothing was built")
        while self._num_words < NUM_WORDS:
            self._say_word(END)
        self._linger()
        raise ToldByRank0

    def _linger(self) -> None:
        """The store goes with rank 0: leave the others a moment to hear."""
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
        """The next word of rank 0, which waits for others itself. The store tells when it is there: nobody polls.

        Raises:
            ToldByRank0: it is `END`.
        """
        from torch.distributed import DistError, DistStoreError

        assert self._store is not None
        key = f"word/{self._num_words}"
        deadline = time.monotonic() + 2 * self._patience_s + GRACE_S
        while time.monotonic() < deadline:
            try:
                self._store.wait([key], timedelta(seconds=LISTEN_S))
                word = self._store.get(key).decode()
            except DistStoreError:  # not yet; Python can now see to signals
                continue
            except DistError:
                break
            self._num_words += 1
            if word == END:
                self._store.add("left", 1)
                raise ToldByRank0
            return word
        raise RuntimeError("preflight: rank 0 has ended, or does not answer; its own message tells why")

    def _missing(self, keys: list[str]) -> list[int]:
        """Ranks whose key has not come when patience ends."""
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
    """Say in `facts` if the search server is too slow, measured now; only where there are cards to be kept idle."""
    import torch

    if not torch.cuda.is_available() or facts.faults:
        return
    line, is_refused = search_shortfall(config, num_gpus=world_size)
    if line:
        (facts.faults if is_refused else facts.warnings).append(line)


def planned_host_memory(config: RunConfig, world_size: int) -> list[HostMemory]:
    """What each rank takes of its machine's memory beside its card; empty without a card.

    Empty as well where there is no plan, for which `check_plan` gives the reason.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        plan, _, _ = plan_of_run(config, num_gpus=world_size)
    except ConfigError:
        return []
    return plan.host_by_rank


def check_plan(config: RunConfig, world_size: int, needs: Needs) -> Plan | None:
    """The plan of `config` on the cards that are seen; None without a card. All ranks call this.

    Of a program without an engine only the update is checked. Without a card only the layout is checked, when the
    ranks are laid out.

    Raises:
        ConfigError: the plan does not fit.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    plan, _, card = plan_of_run(config, num_gpus=world_size)
    if needs.has_engine and not plan.holds_a_sequence:
        key = "kv_cache_gib" if config.rollout.kv_cache_gib else "gpu_memory_fraction"
        raise ConfigError(
            f"rollout.{key} is {getattr(config.rollout, key)}; allowed: so much that the engine's cache holds one "
            "sequence (tools/plan.py CONFIG shows what takes the memory)"
        )
    phases = [phase for phase in plan.phases if needs.has_engine or phase.name == "update"]
    worst = min(phases, key=lambda phase: phase.headroom)
    if worst.headroom < -PLAN_MARGIN:
        raise ConfigError(
            f"the configuration does not fit {world_size} x {card} of {plan.gpu.memory_gib:.0f} GiB: "
            f"{worst.name} takes "
            f"{worst.peak / 2**30:.0f} GiB of each; tools/plan.py CONFIG --suggest looks for a layout"
        )
    return plan


def _tell_engine(plan: Plan) -> None:
    from a2tgpo.plan.advice import cache_shortage
    from a2tgpo.plan.report import share_text

    say(
        f"each engine takes {share_text(plan)}, for {plan.geometry.full_sequences} sequences of full length or "
        f"{plan.geometry.concurrent} of the mean at once"
    )
    if shortage := cache_shortage(plan):
        say(f"warning: {shortage}")


def _summary(found: list[RankFacts], seconds: float) -> str:
    hosts = len({facts.host for facts in found})
    card = found[0].equal.get("GPU", "no GPU")
    skew = max(abs(facts.clock_ahead_s) for facts in found)
    return (
        f"{len(found)} ranks on {hosts} machine{'s' * (hosts > 1)}, {card}: versions, files and configuration agree, "
        f"clocks within {skew:.2g} s, first sum over all ranks right; {seconds:.1f} s"
    )
