"""Collect facts about each rank's machine before a run, and find the ranks whose facts differ from those of most
ranks."""

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
"""Largest allowed difference, in seconds, between the clocks of a rank and of rank 0. The measured difference is
too large if a busy machine reads its clock late."""
SAMPLED_BYTES = 4096
"""Number of bytes that a fingerprint reads at the start of each file, and again at the end of the file."""
SMALL_BYTES = 1 << 20
"""A fingerprint reads files up to this size, such as Python files, in full."""
SEARCH_TIMEOUT_S = 10.0
UNREADABLE = "cannot be read"


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """The facts about a rank and its machine that the rank reports to rank 0."""

    rank: int
    host: str = field(default_factory=platform.node)
    equal: dict[str, str]
    """Facts that must be equal on all ranks: versions, number and kind of the visible GPUs, configuration."""
    paths: dict[str, str]
    """Configuration key -> fingerprint of the files at its path, or `UNREADABLE` with the reason."""
    gpu: str = ""
    """Name, unique in the cluster, of the GPU that this rank will use. It is empty if there is no GPU."""
    clock_ahead_s: float = 0.0
    """Seconds by which this machine's clock is ahead of rank 0's clock."""
    memory_left: tuple[int, str] = (0, "")
    """Bytes of host memory that processes on this machine can still take, and the name of the limit that
    they reach first."""
    faults: list[str] = field(default_factory=list)
    """Faults that this rank found on its own machine, without comparing it with other ranks."""
    warnings: list[str] = field(default_factory=list)
    """Lines about problems that may occur later."""


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
    """Return the facts about this rank and its machine.

    Args:
        paths: maps configuration keys to the paths that every rank must be able to read.
        needs_search: whether to check that the server at search.url answers.
        clock_s: the present time on rank 0's clock, seconds since the epoch.
        marker: the path of a file that rank 0 has just written on the disk of the run's folder. It is empty if rank 0
            could not write the file.
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
    """Return the GPUs that torch sees on this machine; the faults of its GPUs; and warnings about its GPUs."""
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
    """Send one query to the server at search.url, and return the faults that it reveals."""
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
    """Return one fingerprint of the names, the sizes and some of the bytes of all files at `path`."""
    root = Path(path)
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
            with file.open("rb") as stream:
                digest.update(stream.read(size if size <= SMALL_BYTES else SAMPLED_BYTES))
                stream.seek(max(0, size - SAMPLED_BYTES))
                digest.update(stream.read(SAMPLED_BYTES))
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror})"
    return digest.hexdigest()[:12]


def host_memory_faults(
    found: list[RankFacts], planned: list[HostMemory], config: RunConfig
) -> dict[int, list[str]]:
    """Return {first rank of a machine: fault} for each machine that has too little host memory left.

    An excess of up to `cluster.plan_margin` times the memory left (0: any excess) gives a warning instead of a fault.

    Args:
        found: the facts about each rank, in rank order.
        planned: the memory that each rank needs according to the plan, in rank order.
    """
    by_host: dict[str, list[RankFacts]] = {}
    for facts in found:
        by_host.setdefault(facts.host, []).append(facts)
    faults = {}
    for ranks in by_host.values():
        # JSON has turned the other ranks' `memory_left` into lists, so make all of them tuples before comparing.
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
    """Return a map from each faulty rank to its faults.

    A rank is faulty if it reported a fault, or if one of its values differs from the value of most ranks.

    Args:
        found: the facts about each rank, in rank order. In a tie, the value of the lowest rank is taken as right.
        paths: maps configuration keys to the paths that every rank must be able to read. If no rank can read a path,
            no rank counts as faulty: the setting is wrong, and a later check reports it.
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
    """For each rank and name, yield (rank, name, value of the rank, value of most ranks) if these values differ."""
    names = dict.fromkeys(name for of_rank in values for name in of_rank)
    for name in names:
        column = [of_rank.get(name, "none") for of_rank in values]
        usual = Counter(column).most_common(1)[0][0]  # in a tie, this is the value of the lowest rank
        if usual.startswith(UNREADABLE):  # if even one rank can read the path, that rank is right
            usual = next((value for value in column if not value.startswith(UNREADABLE)), usual)
        yield from ((rank, name, value, usual) for rank, value in enumerate(column) if value != usual)
