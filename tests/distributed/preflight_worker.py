"""Start with a fault on one rank, several times, and then once without a fault. Each rank of test_preflight.py runs
this program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections import namedtuple
from unittest import mock

from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.launch import needs, preflight, rank_facts
from a2tgpo.launch.needs import training_inputs
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import ReportedByRank0
from a2tgpo.plan.host_memory import HostMemory
from a2tgpo.run.versions import versions

Usage = namedtuple("Usage", "total used free")


def change(config: RunConfig, section: str, **values) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def refused(attempt: int, config: RunConfig, paths: dict[str, str], *patches) -> str:
    """Return the text that this rank printed about a start that was refused on all ranks."""
    # torchrun's store keeps the keys of earlier starts. This variable distinguishes the present start from them.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            preflight.start_ranks(config, paths)
        except ReportedByRank0:
            return said.getvalue()
    raise AssertionError(f"attempt {attempt} was not refused")


def main(path: str) -> None:
    join_launcher()
    rank = int(os.environ["RANK"])
    config = load_config(path)
    paths = training_inputs(config, resume="auto")
    mine = rank == 1
    other_torch = mock.patch.object(rank_facts, "versions", lambda: versions() | {"torch": "2.12.0"})
    ahead = mock.patch.object(rank_facts.time, "time", lambda now=time.time: now() + 60)
    no_room = mock.patch.object(needs.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    huge = HostMemory(offloaded=0, saving=1e15, loading=0, processes=0)
    too_much = mock.patch.object(preflight, "planned_host_memory", lambda config, ranks: [huge] * ranks)
    elsewhere = mock.patch.object(
        preflight,
        "gather_facts",
        lambda *a, **place: rank_facts.gather_facts(*a, **place | {"marker": "/x/y"}),
    )
    few_files = mock.patch.object(preflight, "limit_fault", lambda ranks: f"{ranks} ranks, few files")
    here = contextlib.nullcontext()
    nothing = paths | {"data.train": "/nowhere/train.jsonl"} if mine else paths
    other = paths | {"data.train": paths["model.path"]} if mine else paths
    http = {"backend": "http", "url": "http://127.0.0.1:9/retrieve"}
    starts = {
        "torch is 2.12.0, but": (config, paths, other_torch if mine else here),
        f"data.train: {paths['data.train']} cannot be read (No such file or directory)": (
            config,
            nothing,
            here,
        ),
        f"data.train: {paths['data.train']} differs from what most ranks see": (config, other, here),
        "its clock is 60 s ahead of rank 0's": (config, paths, ahead if mine else here),
        "run.root: /x is another folder than on rank 0": (config, paths, elsewhere if mine else here),
        "2 ranks, few files": (config, paths, few_files if mine else here),
        "has another configuration than most ranks": (
            change(config, "update", lr=1.0) if mine else config,
            paths,
            here,
        ),
    }
    remote = change(change(config, "tools", outage_limit_s=60.0), "search", **http)
    attempt = 0
    for attempt, (cause, start) in enumerate(starts.items(), 1):
        said = refused(attempt, *start).splitlines()
        expected = 2 if rank == 0 else 0
        assert len(said) == expected, said
        if rank == 0:
            assert said[0].startswith("preflight: rank 1 on ") and cause in said[0], said
            assert said[1] == "preflight: 1 of 2 ranks failed; no model was built", said
    said = refused(attempt + 1, config, paths, no_room) + refused(attempt + 2, remote, paths)
    said += refused(attempt + 3, config, paths, too_much)
    if rank == 0:
        assert "rank 0 on" in said and "GiB of a node's memory are needed" in said, said
        assert "rank 0 on" in said and "GB left, the checkpoints need" in said, said
        assert "search.url: http://127.0.0.1:9/retrieve cannot be reached" in said, said
    if mine:
        time.sleep(3)
    else:
        impatient = change(config, "parallel", start_timeout_s=1.0)
        said = refused(attempt + 4, impatient, paths)
        assert "rank 1 did not arrive within 1 s (parallel.start_timeout_s)" in said, said
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt + 5)
    groups = preflight.start_ranks(config, paths)
    assert groups.world_size == 2
    check_side_store(rank)
    print(f"rank {rank}: all checks passed", flush=True)


def check_side_store(rank: int) -> None:
    """The other rank receives a message in the side store. The side store's timeout does not limit the creation of
    communicators.
    """
    import torch.distributed as dist

    from a2tgpo.lifecycle.side_store import side_store

    default = dist.distributed_c10d._get_default_store()
    before, store = default.timeout, side_store("side", timeout_s=7)
    store.set(f"from {rank}", str(rank))
    assert store.get(f"from {1 - rank}") == str(1 - rank).encode()
    assert default.timeout == before != store.timeout


def stuck(path: str) -> None:
    """Rank 1 joins, but does not take part in the first sum."""
    join_launcher()
    config = change(load_config(path), "parallel", start_timeout_s=8.0)
    if os.environ["RANK"] == "1":
        import torch.distributed as dist

        dist.all_reduce = lambda tensor: time.sleep(100)
    preflight.start_ranks(config, training_inputs(config, resume="auto"))


if __name__ == "__main__":
    _, _, config_path, what = sys.argv
    {"faults": main, "stuck": stuck}[what](config_path)
