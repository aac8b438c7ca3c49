"""Run warm starts on forked ranks, as launch/warmstart.py does: undisturbed, and ended at several points one after
another.

    python warm_start_worker.py FOLDER

The modules that all ranks need are imported once. FOLDER contains config.yaml. The program writes the models, the
folders of the warm starts, and codes.json with the exit code of each rank of each start. The code is 0 for a rank
that was ended because another rank had died.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.launch.preflight import start_ranks
from a2tgpo.warmstart import loop
from launch import warmstart

assert start_ranks, "imported here for all ranks"


def passing(owner: Any, name: str, *, at: int, action: Callable[[], None]) -> None:
    """Run `action` before call number `at` of `owner.name`, counted from 1."""
    function, count = getattr(owner, name), [0]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_step(step: int, action: Callable[[], None]) -> None:
    """Run `action` before the update of `step`."""
    train_step = loop.WarmStart._train_step

    def wrapped(self: loop.WarmStart) -> None:
        if self.step + 1 == step:
            action()
        train_step(self)

    loop.WarmStart._train_step = wrapped  # type: ignore[method-assign]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def start(
    folder: Path, name: str, *overrides: str, ranks: int, faults: dict[int, Callable[[], None]]
) -> list[int]:
    """Return the exit codes of the ranks of one start. `faults` maps ranks to faults, which are installed first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = ["warmstart.py", "--config", str(folder / "config.yaml"), f"run.name={name}"]
            sys.argv += [f"model.path={folder / name}", *overrides]
            code = 1
            try:
                faults.get(rank, lambda: None)()
                code = warmstart.main()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return ends_of(children)


def ends_of(children: list[int]) -> list[int]:
    """When one rank has died, end the other ranks, as a launcher does. Return the exit codes."""
    codes: dict[int, int] = {}
    ended_by_us = set()
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = 0 if child in ended_by_us else os.waitstatus_to_exitcode(status)
        if codes[child] < 0:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
                ended_by_us.add(other)
    return [codes[child] for child in children]


def main(folder: Path) -> None:
    at_save = functools.partial(passing, checkpoint, "put_in_place", at=2, action=kill)
    before_export = functools.partial(passing, loop, "save_hf", at=1, action=kill)
    starts: dict[str, tuple[str, list[str], dict[int, Callable[[], None]]]] = {
        "one": ("one", [], {}),
        "two": ("two", [], {}),
        "killed before the update of step 2": ("ended", [], {1: lambda: in_step(2, kill)}),
        "stopped by a signal in step 4": ("ended", [], {0: lambda: in_step(4, ask_to_stop)}),
        "killed while step 6 is saved": ("ended", [], {0: at_save}),
        "started with another learning rate": ("ended", ["warmstart.lr=0.02"], {}),
        "killed before the model is in place": ("ended", [], {0: before_export}),
        "goes on to the end": ("ended", [], {}),
    }
    codes = {}
    for what, (name, overrides, faults) in starts.items():
        begin = time.monotonic()
        codes[what] = start(folder, name, *overrides, ranks=1 if name == "one" else 2, faults=faults)
        print(f"{what}: {codes[what]} after {time.monotonic() - begin:.1f} s", flush=True)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
