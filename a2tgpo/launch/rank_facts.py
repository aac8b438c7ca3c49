"""Collect facts about each rank's machine before a run, and find ranks that differ from the others."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.cuda_versions import check_toolkit, unusable_gpus
from a2tgpo.launch.host_memory import memory_left
from a2tgpo.plan.advice import host_change, host_needs
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.host_memory import HostMemory, sum_of
from a2tgpo.run.versions import versions

MAX_CLOCK_SKEW_S = 5.0
"""Largest difference to rank 0's clock, seconds. Synchronised machines differ by milliseconds; the rest allows for
the delay with which a loaded machine reads its clock."""
SAMPLED_BYTES = 4096
"""Bytes read of each file of a path, at its start and at its end."""
SEARCH_TIMEOUT_S = 10.0
UNREADABLE = "cannot be read"


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """Facts that a rank reports to rank 0. Everything in `equal` must be the same on all ranks."""

    rank: int
    host: str = field(default_factory=platform.node)
    equal: dict[str, str]
    """Versions, number of visible GPUs, kind of GPU, configuration."""
    paths: dict[str, str]
    """By configuration key: fingerprint of the files, or `UNREADABLE` with the reason."""
    gpu: str = ""
    """Identifies the GPU that this rank will use within the cluster; empty without a GPU."""
    clock_ahead_s: float = 0.0
    """Difference to rank 0's clock."""
    memory_left: tuple[int, str] = (0, "")
    """Host memory still available to processes on this machine, bytes, and what limits it."""
    faults: list[str] = field(default_factory=list)
    """Faults of this rank, independent of other ranks."""
    warnings: list[str] = field(default_factory=list)
    """Possible later problems."""


def gather_facts(
    config: RunConfig,
    paths: Mapping[str, str],
    *,
    rank: int,
    local_rank: int,
    needs_search: bool,
    clock_s: float,
    marker: str,
) -> RankFacts:
    """Collect this machine's facts.

    Args:
        paths: by configuration key, the paths that every rank must be able to read.
        needs_search: check that the server of search.url answers.
        clock_s: rank 0's clock now, seconds since the epoch.
        marker: a file that rank 0 has just written in the run's place; empty: rank 0 could not write it.
    """
    ahead_s = time.time() - clock_s
    gpus, faults, warnings = see_gpus(local_rank)
    if marker and not Path(marker).exists():
        faults.append(
            f"run.root: {Path(marker).parent} is another folder than on rank 0; all machines need the "
            "same shared file system"
        )
    elif marker and not os.access(Path(marker).parent, os.W_OK):
        faults.append(f"run.root: {Path(marker).parent} cannot be written")
    if local_rank == 0 and needs_search:
        faults += search_server_faults(config)
    configuration = hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]
    return RankFacts(
        rank=rank,
        equal=versions() | gpus.equal | {"the resolved configuration": configuration},
        paths={key: path_fingerprint(path) for key, path in paths.items()},
        gpu=gpus.uuid,
        clock_ahead_s=ahead_s,
        memory_left=memory_left(),
        faults=faults,
        warnings=warnings,
    )


@dataclass(frozen=True)
class Gpus:
    equal: dict[str, str]
    uuid: str = ""


def see_gpus(local_rank: int) -> tuple[Gpus, list[str], list[str]]:
    """Return the GPUs that torch sees here, their faults, and warnings about them."""
    import torch

    if not torch.cuda.is_available():
        return Gpus({"GPUs seen": "0"}), unusable_gpus(), []
    count = torch.cuda.device_count()
    if local_rank >= count:
        fault = (
            f"sees {count} GPU(s) and is rank {local_rank} of this machine: start one rank per GPU, without "
            "--gpus-per-task and --gpu-bind, so that each rank sees all GPUs"
        )
        return Gpus({"GPUs seen": str(count)}), [fault], []
    card = torch.cuda.get_device_properties(local_rank)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    memory = f"{card.total_memory / 2**30:.1f}"
    equal = {"GPUs seen": str(count), "GPU": card.name, "GPU memory, GiB": memory, "NCCL": nccl}
    return Gpus(equal, str(getattr(card, "uuid", ""))), [], check_toolkit(torch.version.cuda)


def search_server_faults(config: RunConfig) -> list[str]:
    """Query the server of search.url once from here; return its faults."""
    from dataclasses import replace

    from a2tgpo.search.tool import build_search

    if config.search.backend != "http" or "search" not in config.tools.names:
        return []
    timeout_s = min(config.search.request_timeout_s, SEARCH_TIMEOUT_S)
    try:
        build_search(replace(config.search, max_attempts=1, request_timeout_s=timeout_s)).close()
    except ConfigError as error:
        return [str(error)]
    return []


def path_fingerprint(path: str) -> str:
    """Fingerprint names, sizes and both ends of the files at `path`: equal on two machines with the same files."""
    root = Path(path)
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(0, size - SAMPLED_BYTES))
                digest.update(stream.read(SAMPLED_BYTES))
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror})"
    return digest.hexdigest()[:12]


def host_memory_faults(
    found: list[RankFacts], planned: list[HostMemory], config: RunConfig
) -> dict[int, list[str]]:
    """Return a fault for each machine with less memory left than its ranks are planned to take, by the machine's
    first rank.

    A machine whose memory the plan exceeds by no more than `cluster.plan_margin` gets a warning instead.

    Args:
        found: facts of all ranks, by rank.
        planned: bytes that each rank needs, by rank.
    """
    by_host: dict[str, list[RankFacts]] = {}
    for facts in found:
        by_host.setdefault(facts.host, []).append(facts)
    faults = {}
    for ranks in by_host.values():
        # Index `memory_left`: facts that came through JSON have a list in place of the tuple.
        left, limit = min((facts.memory_left[0], facts.memory_left[1]) for facts in ranks)
        needed = sum_of([planned[facts.rank] for facts in ranks])
        if needed.total > left:
            line = (
                f"{host_needs(needed)}, {left / GIB:.0f} GiB are free ({limit}); give the job the whole node's "
                f"memory (Slurm: --mem=0), {host_change(config)}"
            )
            if config.cluster.refuses(needed.total, left):
                faults[ranks[0].rank] = [f"{line}; cluster.plan_margin=0 starts all the same"]
            else:
                ranks[0].warnings.append(line)
    return faults


def compare(found: list[RankFacts], paths: Mapping[str, str]) -> dict[int, list[str]]:
    """Map each faulty rank to the faults that it reported and to its values that differ from the majority.

    Args:
        found: facts of all ranks, by rank; in a tie, rank 0 is right.
        paths: by configuration key. Paths that no rank can read are a mistake in the configuration, which is reported
            later.
    """
    causes = {facts.rank: list(facts.faults) for facts in found}
    for rank, name, value, usual in _odd([facts.equal for facts in found]):
        if name == "the resolved configuration":
            causes[rank].append(
                "has another configuration than most ranks; check that it reads the same file"
            )
        else:
            causes[rank].append(f"{name} is {value}, but {usual} on most ranks")
    for rank, key, value, _ in _odd([facts.paths for facts in found]):
        state = value if value.startswith(UNREADABLE) else "differs from what most ranks see"
        causes[rank].append(f"{key}: {paths[key]} {state}")
    users: dict[str, int] = {}
    for facts in found:
        first = users.setdefault(facts.gpu, facts.rank) if facts.gpu else facts.rank
        if first != facts.rank:
            causes[facts.rank].append(f"has the same GPU as rank {first}; start one rank per GPU")
        if abs(facts.clock_ahead_s) > MAX_CLOCK_SKEW_S:
            direction = "ahead of" if facts.clock_ahead_s > 0 else "behind"
            causes[facts.rank].append(
                f"its clock is {abs(facts.clock_ahead_s):.0f} s {direction} rank 0's; synchronise it (NTP)"
            )
    return {rank: faults for rank, faults in causes.items() if faults}


def _odd(values: list[dict[str, str]]) -> Iterator[tuple[int, str, str, str]]:
    """Yield (rank, name, its value, the usual value) for each value that differs from the majority."""
    names = dict.fromkeys(name for of_rank in values for name in of_rank)
    for name in names:
        column = [of_rank.get(name, "none") for of_rank in values]
        usual = Counter(column).most_common(1)[0][0]  # in a tie, the value of the lowest rank
        if usual.startswith(UNREADABLE):  # a single rank that can read it is right
            usual = next((value for value in column if not value.startswith(UNREADABLE)), usual)
        yield from ((rank, name, value, usual) for rank, value in enumerate(column) if value != usual)
