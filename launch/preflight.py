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
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from a2tgpo.config.check import ConfigError
from a2tgpo.config.run import RunConfig
from launch.failure import BROKEN_RUN, GRACE_S, ToldByRank0
from launch.rank_facts import RankFacts, compare, disk_fault, gather_facts, host_memory_faults
from launch.run_plan import plan_of_run

if TYPE_CHECKING:
    from torch.distributed import Store

    from a2tgpo.parallel.groups import ParallelGroups
    from a2tgpo.plan.host_memory import HostMemory

MAX_LINES = 20
"""Ranks whose causes are told one by one."""
SELF_CONNECT_S = 15.0
"""Longest wait of rank 0 for a connection to the store that it serves itself."""
BYTES_PER_PARAMETER = {"bfloat16": 14, "float32": 12}
"""Of a checkpoint: weights, two moments, and float32 weights beside those in bfloat16."""
PLAN_MARGIN = 0.1
"""A plan this share above a card's memory is let through: no plan has been held against a card yet."""


def start_ranks(config: RunConfig, paths: Mapping[str, str]) -> ParallelGroups:
    """Check all ranks, then join them as `initialize` does; every rank calls this, first.

    Args:
        paths: by configuration key, what every rank must be able to read.

    Raises:
        ToldByRank0: a rank failed; rank 0 has said which and why.
        ConfigError: the plan does not fit, on all ranks alike.
        RuntimeError: one line; rank 0 cannot be reached from here.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    begin = time.monotonic()
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    meeting = Meeting(store, rank=rank, world_size=world_size, patience_s=config.parallel.start_timeout_s)
    found = meeting.exchange(config, paths)
    check_plan(config, world_size)
    seconds = time.monotonic() - begin
    groups, seconds_joining = join(config, store, rank=rank, world_size=world_size)
    if rank == 0 and world_size > 1:
        say(_summary(found, seconds + seconds_joining))
    return groups


def meet_ranks(config: RunConfig) -> ParallelGroups:
    """Join the ranks without a look at their machines, for what only reads a run; every rank calls this, first.

    Raises:
        RuntimeError: one line; rank 0 cannot be reached from here.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = open_store(config.parallel.start_timeout_s) if world_size > 1 else None
    groups, _ = join(config, store, rank=rank, world_size=world_size)
    return groups


def say(line: str) -> None:
    print(f"preflight: {line}", file=sys.stderr, flush=True)


def open_store(timeout_s: float) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 serves unless torchrun does.

    Raises:
        RuntimeError: one line; it cannot be served, or not reached within `timeout_s`.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    address, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    is_server = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=is_server,
            timeout=timedelta(seconds=min(timeout_s, SELF_CONNECT_S) if is_server else timeout_s),
            wait_for_workers=False,
        )
    except DistError as error:
        where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
        if is_server:
            reason = "is in use" if "EADDRINUSE" in str(error) else "does not lead to this machine"
            raise RuntimeError(
                f"preflight: {where} {reason}, {platform.node()}, where rank 0 runs; export an address and a free "
                "port of this machine, or unset both if another job left them in the environment"
            ) from None
        raise RuntimeError(
            f"preflight: {platform.node()} did not reach rank 0 at {where} within {timeout_s:g} s: rank 0 did not "
            "start, or a firewall or a name that means another machine is between them"
        ) from None
    store.set_timeout(timedelta(seconds=timeout_s))
    # torchrun's store outlives a restart of its ranks.
    return PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Meeting:
    """Where ranks bring their facts, and hear rank 0's verdict. No wait is without an end.

    Args:
        store: None for a rank that is alone.
        patience_s: longest wait for the last rank to come, and again to look at its machine.
    """

    def __init__(self, store: Store | None, *, rank: int, world_size: int, patience_s: float):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._patience_s = patience_s

    def exchange(self, config: RunConfig, paths: Mapping[str, str]) -> list[RankFacts]:
        """The facts of all ranks on rank 0, and this one's elsewhere, if all is well."""
        if self._rank == 0:
            return self._lead(config, paths)
        self._set(f"here/{self._rank}", platform.node())
        place = json.loads(self._hear("place"))
        facts = gather_facts(config, paths, rank=self._rank, local_rank=_local_rank(), **place)
        self._set(f"facts/{self._rank}", json.dumps(dataclasses.asdict(facts)))
        self._verdict()
        return [facts]

    def _lead(self, config: RunConfig, paths: Mapping[str, str]) -> list[RankFacts]:
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
        clock_s = time.time()
        try:
            self._set("place", json.dumps({"clock_s": clock_s, "marker": seen}))
            mine = gather_facts(config, paths, rank=0, local_rank=_local_rank(), clock_s=clock_s, marker=seen)
            silent = self._missing([f"facts/{rank}" for rank in others])
        finally:
            marker.unlink(missing_ok=True)
        if silent:
            self._refuse(
                {
                    rank: [
                        f"on {self._get(f'here/{rank}')}: did not look at its machine within {self._patience_s:g} s"
                    ]
                    for rank in silent
                }
            )
        found = [mine] + [RankFacts(**json.loads(self._get(f"facts/{rank}"))) for rank in others]
        if fault := _disk_fault(config, folder):
            mine.faults.append(fault)
        planned = planned_host_memory(config, self._world_size)
        if causes := compare(found, paths) or (planned and host_memory_faults(found, planned, config)):
            self._refuse(
                {rank: [f"on {found[rank].host}: {'; '.join(told)}"] for rank, told in causes.items()}
            )
        first_of = {text: facts for facts in reversed(found) for text in facts.warnings}
        for text, first in first_of.items():
            say(f"warning: rank {first.rank} on {first.host}: {text}")
        self._set("verdict", "go")
        return found

    def _refuse(self, causes: dict[int, list[str]]) -> None:
        for rank, told in list(causes.items())[:MAX_LINES]:
            say(f"rank {rank} {'; '.join(told)}")
        more = f", of which {MAX_LINES} are named" if len(causes) > MAX_LINES else ""
        say(f"{len(causes)} of {self._world_size} ranks failed{more}; nothing was built")
        self._set("verdict", "end")
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

    def _verdict(self) -> None:
        verdict = self._hear("verdict")
        if verdict != "go":
            assert self._store is not None
            self._store.add("left", 1)
            raise ToldByRank0

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            self._store.set(key, value)

    def _get(self, key: str) -> str:
        assert self._store is not None
        return self._store.get(key).decode()

    def _hear(self, key: str) -> str:
        """What rank 0 says, which waits for others itself; or the verdict, if it comes to that before."""
        from torch.distributed import DistError

        assert self._store is not None
        deadline = time.monotonic() + 2 * self._patience_s + GRACE_S
        while time.monotonic() < deadline:
            try:
                if self._store.check([key]):
                    return self._get(key)
                if self._store.check(["verdict"]):
                    self._verdict()
            except DistError:
                break
            time.sleep(0.005)
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


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _disk_fault(config: RunConfig, folder: Path) -> str | None:
    needed = checkpoint_bytes(config) * copies_to_come(config)
    return disk_fault(folder, needed_bytes=needed) if needed else None


def checkpoint_bytes(config: RunConfig) -> float:
    """Size of one checkpoint; 0 where the model cannot be read, which is told when it is."""
    from a2tgpo.plan.dimensions import read_dimensions
    from a2tgpo.plan.parameters import checkpoint_parameters

    try:
        dimensions = read_dimensions(config.model.path)
    except (ConfigError, OSError):
        return 0.0
    return checkpoint_parameters(dimensions) * BYTES_PER_PARAMETER[config.model.dtype]


def copies_to_come(config: RunConfig) -> int:
    """Checkpoints that will stand beside those already there: a new one is whole before the oldest goes."""
    planned = 1 + (config.run.steps - 1) // config.checkpoint.every if config.checkpoint.every else 1
    best = config.checkpoint.best_by != "none"
    there = len(list((Path(config.run.root) / config.run.name / "checkpoints").glob("step_*/complete.json")))
    return max(1, min(config.checkpoint.keep + 1 + best, planned) - there)


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


def check_plan(config: RunConfig, world_size: int) -> None:
    """Raise `ConfigError` if the plan of `config` does not fit the cards that are seen; all ranks call this.

    Without a card only the layout is checked, when the ranks are laid out.
    """
    import torch

    if not torch.cuda.is_available():
        return
    plan, _, card = plan_of_run(config, num_gpus=world_size)
    if not plan.holds_a_sequence:
        key = "kv_cache_gib" if config.rollout.kv_cache_gib else "gpu_memory_fraction"
        raise ConfigError(
            f"rollout.{key} is {getattr(config.rollout, key)}; allowed: so much that the engine's cache holds one "
            "sequence (tools/plan.py CONFIG shows what takes the memory)"
        )
    worst = min(plan.phases, key=lambda phase: phase.headroom)
    if worst.headroom < -PLAN_MARGIN:
        raise ConfigError(
            f"the configuration does not fit {world_size} x {card} of {plan.gpu.memory_gib:.0f} GiB: "
            f"{worst.name} takes "
            f"{worst.peak / 2**30:.0f} GiB of each; tools/plan.py CONFIG --suggest looks for a layout"
        )


def join(
    config: RunConfig, store: Store | None, *, rank: int, world_size: int
) -> tuple[ParallelGroups, float]:
    """Join the process group and sum one number over it, within `parallel.start_timeout_s`; every rank calls this.

    Returns:
        The groups, and the seconds it took, without those of importing Megatron.

    Raises:
        RuntimeError: one line; the backend could not connect this rank.
    """
    import torch
    import torch.distributed as dist

    from a2tgpo.parallel.initialize import initialize

    if store is None:
        return initialize(config.parallel, seed=config.run.seed), 0.0
    store.set(f"ready/{rank}", "")
    deadline = Deadline(
        store.clone(),  # type: ignore[attr-defined]  # torch's stub lacks it
        config.parallel.start_timeout_s,
        rank=rank,
        world_size=world_size,
    )
    begin = time.monotonic()
    try:
        groups = initialize(config.parallel, seed=config.run.seed, store=store)
        total = torch.ones(1, device=groups.device)
        dist.all_reduce(total)
        total = total.cpu()
    except dist.DistError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"preflight: {platform.node()} is not connected to all ranks ({reason:.300})"
        ) from None
    assert total.item() == world_size, f"{total.item()} of {world_size} ranks in the first sum"
    deadline.met()
    return groups, time.monotonic() - begin


class Deadline:
    """Ends the process unless `met` is called in time: a collective that hangs cannot be given up."""

    def __init__(self, store: Store, seconds: float, *, rank: int, world_size: int):
        self._store, self._seconds, self._rank, self._world_size = store, seconds, rank, world_size
        # Rank 0 speaks first.
        self._timer = threading.Timer(seconds + (GRACE_S if rank else 0), self._end)
        self._timer.daemon = True
        self._timer.start()

    def met(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        if self._rank == 0:
            late = [rank for rank in range(self._world_size) if not self._store.check([f"ready/{rank}"])]
            for rank in late[:MAX_LINES]:
                key = f"here/{rank}"  # not told where the machines were not looked at
                host = f" on {self._store.get(key).decode()}" if self._store.check([key]) else ""
                say(f"rank {rank}{host}: not ready to join the others within {self._seconds:g} s")
            if not late:
                say(
                    f"all {self._world_size} ranks are there, but their first sum did not end within "
                    f"{self._seconds:g} s: the network between them; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names "
                    "the interface, NCCL_DEBUG=INFO tells more"
                )
        os._exit(BROKEN_RUN)


def _summary(found: list[RankFacts], seconds: float) -> str:
    hosts = len({facts.host for facts in found})
    card = found[0].equal.get("GPU", "no GPU")
    skew = max(abs(facts.clock_ahead_s) for facts in found)
    return (
        f"{len(found)} ranks on {hosts} machine{'s' * (hosts > 1)}, {card}: versions, files and configuration agree, "
        f"clocks within {skew:.2g} s, first sum over all ranks right; {seconds:.1f} s"
    )
