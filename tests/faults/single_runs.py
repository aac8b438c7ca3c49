"""Faults that a run survives, or after which it ends on its own. A fault has its own run or shares a run with other
faults.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from faults.chain import PROMPT_S
from faults.harness import INJECTED, ROOT, Ended, Row, start
from faults.scripted_server import ScriptedServer

FREE_BYTES = 700_000
"""Bytes left on the full disk: enough for metrics, but too few for a checkpoint."""


def records_of(run: Path) -> dict[int, dict]:
    return {r["step"]: r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def search_faults(config: Path) -> list[Row]:
    """Run through every kind of bad server, with a good step between two bad steps. The cache is off."""
    kinds = ["garbage", "oversized", "not UTF-8", "wrong shape", "error", "slow", "down"]
    script = {3 * i + 2: kind for i, kind in enumerate(kinds)}
    steps = 3 * len(kinds) + 1
    own = config.with_name("search.yaml")
    own.write_text(config.read_text())
    step_file = config.with_name("step")
    step_file.write_text("0")
    with ScriptedServer(step_file, script) as server:
        settings = [
            "request_timeout_s=1",
            "max_attempts=2",
            "backend=http",
            f"url={server.url}",
            "break_after=4",
            "break_s=0.2",
        ]
        ended = start(
            own,
            "run.name=search",
            f"run.steps={steps}",
            "evaluation.every=0",
            *(f"search.{setting}" for setting in settings),
            "tools.on_outage=continue",
            faults=[
                {"point": "step begins", "action": "forget searches", "step": step}
                for step in range(1, steps + 1)
            ],
            environment={"STEP_FILE": str(step_file)},
        )
        asked = dict(server.asked)
    if ended.code:
        return [Row("search server", "all", False, f"exit code {ended.code}: {ended.output[-500:]}")]
    records, rows = records_of(config.parent / "search"), []
    for step, kind in script.items():
        record, after = records[step], records[step + 2]
        calls, failures = record["tools/calls"], record["tools/failures"]
        passed = failures == calls > 0 == after["tools/failures"] and after["tools/calls"] > 0
        told = f"{failures:.0f} of {calls:.0f} searches failed ({asked.get(step, 0)} requests), the policy was told"
        outcome = (
            f"{told}; two steps later {after['tools/failures']:.0f} of {after['tools/calls']:.0f} failed"
        )
        rows.append(Row(f"search server: {kind}", f"rollout (step {step})", passed, outcome))
    return rows


def outage(config: Path) -> list[Row]:
    """The search server dies in the rollouts of three steps of one run. The first time it comes back some seconds
    later. The second time a signal arrives while the rollout waits, and ends the start. The third time the server
    does not come back, and the outage's limit ends the run.
    """
    own = config.with_name("outage.yaml")
    own.write_text(config.read_text())
    run = config.parent / "outage"
    signal = {"point": "outage", "action": "usr1", "step": 4, "rank": 1, "call": 20}
    signalled = start_with_dying_server(own, {2: 3.0, 4: None}, signal, "tools.outage_limit_s=100")
    is_saved = (run / "checkpoints" / "step_3" / "complete.json").exists()
    limited = start_with_dying_server(own, {5: None}, None, "tools.outage_limit_s=5")
    records = records_of(run)
    failed = {step: record["tools/failures"] for step, record in records.items()}
    alarms = {step: record["alarm/outage"] for step, record in records.items()}
    waited = records.get(2, {}).get("tools/outage_s", 0.0)
    went_on = alarms == {1: 0, 2: 1, 3: 0, 4: 0} and not any(failed.values()) and waited > 1
    obeyed = [
        line for line in signalled.lines if line.startswith("stopped after step 3 of 9: SIGUSR1; saved")
    ]
    took_s = signalled.fault_s if signalled.fault_s is not None else math.inf
    said = [
        line for line in limited.lines if line.startswith("stopped after step 4 of 9: the search tool has")
    ]
    ended_saved = (run / "checkpoints" / "step_4" / "complete.json").exists()
    return [
        Row(
            "search server killed, back after 3 s",
            "rollout (step 2)",
            went_on,
            f"waited {waited:.1f} s, no search failed, alarm, went on: {alarms} {failed}",
        ),
        Row(
            "SIGUSR1, rank 1, while the search server is dead",
            "rollout (step 4)",
            signalled.code == 75 and len(obeyed) == 1 and is_saved and took_s < PROMPT_S,
            f"saved and ended with {signalled.code} after {took_s:.1f} s: {(obeyed or [signalled.output[-800:]])[0]}",
            signalled.fault_s,
        ),
        Row(
            "search server killed for good",
            "rollout (step 5)",
            limited.code == 75 and len(said) == 1 and ended_saved,
            f"saved and ended with {limited.code}: {(said or [limited.output[-800:]])[0]}",
        ),
    ]


def start_with_dying_server(
    config: Path, deaths: dict[int, float | None], fault: dict | None, *settings: str
) -> Ended:
    """Start the run `outage` with a search server that dies as in `keep_server`."""
    step_file = config.with_name("outage_step")
    step_file.write_text("0")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    search = ["backend=http", f"url=http://127.0.0.1:{port}/retrieve", "request_timeout_s=2"]
    search += ["max_attempts=2", "break_after=4", "break_s=0.2"]
    fresh = [{"point": "step begins", "action": "forget searches", "step": step} for step in range(1, 9)]
    with ThreadPoolExecutor(1) as keeper:
        keeping = keeper.submit(keep_server, port, step_file, deaths)
        ended = start(
            config,
            "run.name=outage",
            "run.steps=9",
            "evaluation.every=0",
            "checkpoint.every=0",
            *(f"search.{setting}" for setting in search),
            *settings,
            faults=[*fresh, fault] if fault else fresh,
            environment={"STEP_FILE": str(step_file)},
        )
        step_file.write_text("-1")  # -1 is no step, so the keeper ends
        keeping.result()
    return ended


def keep_server(port: int, step_file: Path, deaths: dict[int, float | None]) -> None:
    """Run a search server that dies at each step in `deaths`, and start it again after the given number of
    seconds.
    """
    program = [sys.executable, str(Path(__file__).with_name("scripted_server.py")), str(port), str(step_file)]
    for step, back_after_s in deaths.items():
        server = subprocess.Popen([*program, str(step)])
        while server.poll() is None and step_file.read_text() != "-1":
            time.sleep(0.05)
        if back_after_s is None or server.poll() is None:
            server.kill()
            server.wait()
            return
        time.sleep(back_after_s)


def poisoned(config: Path) -> list[Row]:
    """One loss that is not finite is skipped on all ranks. Three steps with such a loss end the run."""
    own = config.with_name("poisoned.yaml")
    own.write_text(config.read_text())
    faults = [{"point": "update", "action": "nan", "step": 2, "rank": 1}]
    faults += [{"point": "update", "action": "nan", "step": step, "rank": 0} for step in (4, 5, 6)]
    ended = start(own, "run.name=poisoned", "run.steps=9", "guard.stop_after_skipped=3", faults=faults)
    records = records_of(config.parent / "poisoned")
    skipped = {step: record["update/skipped"] for step, record in records.items()}
    stopped = [line for line in ended.lines if line.startswith("stopped after step 6 ")]
    once = skipped == {1: 0, 2: 1, 3: 0, 4: 1, 5: 1, 6: 1}
    return [
        Row("loss is NaN once, rank 1", "update (step 2)", once, f"skipped on all ranks, counted: {skipped}"),
        Row(
            "loss is NaN again and again, rank 0",
            "update (steps 4 to 6)",
            once and ended.code == 3 and len(stopped) == 1,
            f"saved and stopped with {ended.code}: {(stopped or [ended.output[-400:]])[0]}",
        ),
    ]


def slow_rank(config: Path) -> list[Row]:
    """One rank's rollouts take longer in three consecutive steps."""
    own = config.with_name("slow_rank.yaml")
    own.write_text(config.read_text())
    faults = [
        {"point": "rollout", "action": "sleep", "seconds": 8.0, "step": step, "call": 5, "rank": 1}
        for step in (2, 3, 4)
    ]
    settings = ("run.steps=5", "evaluation.every=0", "watchdog.slow_steps=3")
    ended = start(own, "run.name=slow_rank", *settings, faults=faults)
    said = [line for line in ended.output.splitlines() if "is slow" in line]
    passed = ended.code == 0 and len(said) == 1 and said[0].startswith("step 4: rank 1 is slow: its rollout")
    return [
        Row(
            "slow, rank 1", "rollout (steps 2 to 4)", passed, f"went on; {(said or [ended.output[-400:]])[0]}"
        )
    ]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 32 MB at `folder`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(config: Path) -> list[Row]:
    """In one run the disk is full while one checkpoint is due. In another run it stays full."""
    own = config.with_name("disk.yaml")
    own.write_text(config.read_text())
    rows = []
    with small_disk(config.with_name("disk")) as disk:
        fill = {"point": "record", "action": "fill disk", "path": str(disk), "free": FREE_BYTES, "rank": 0}
        empty = {"point": "record", "action": "empty disk", "path": str(disk), "rank": 0}
        common = (f"run.root={disk}", "run.steps=8", "evaluation.every=0")
        faults = [fill | {"step": 4}, empty | {"step": 5}]
        ended = start(own, *common, "run.name=once", faults=faults)
        failed = [
            line for line in ended.lines if "step 4 could not be written" in line and "No space left" in line
        ]
        kept = sorted(path.name for path in (disk / "once/checkpoints").glob("step_*"))
        counted = sum("checkpoint/failed" in record for record in records_of(disk / "once").values())
        wanted = ["step_6", "step_8"]  # checkpoint.keep=2; the best is step 8, the only evaluated step
        passed = ended.code == 0 and len(failed) == 1 and counted == 1 and kept == wanted
        rows.append(
            Row("disk full for a while", "save (step 4)", passed, f"warned, went on, later saves: {kept}")
        )
        shutil.rmtree(disk / "once")
        ended = start(own, *common, "run.name=ever", "checkpoint.max_failures=2", faults=faults[:1])
        errors = [line for line in ended.lines if line.startswith("error:")]
        kept = sorted(path.name for path in (disk / "ever/checkpoints").glob("step_*"))
        passed = ended.code == 3 and len(errors) == 1 and "No space left" in errors[0] and kept == ["step_2"]
        rows.append(
            Row("disk full for good", "save (step 4, 6)", passed, (errors or [ended.output[-400:]])[0])
        )
        (disk / "filling").unlink()
        ended = start(own, *common, "run.name=ever")
        passed = ended.code == 0 and sorted(records_of(disk / "ever")) == list(range(1, 9))
        rows.append(
            Row("disk full for good, then emptied", "next start", passed, "resumed from step 2 and finished")
        )
    return rows


def clock_jumps(config: Path, undisturbed: Path) -> list[Row]:
    """The system's clock jumps forward by a day, and back by two days."""
    from faults.harness import metrics_of

    own = config.with_name("clock.yaml")
    own.write_text(config.read_text())
    faults = [
        {"point": "rollout", "action": "jump clock", "seconds": 86_400.0, "step": 2},
        {"point": "save: copy", "action": "jump clock", "seconds": -172_800.0, "step": 4},
    ]
    ended = start(own, "run.name=clock", "run.steps=5", faults=faults)
    found, expected = metrics_of(config.parent / "clock"), metrics_of(undisturbed)
    equal = all(found.get(step) == expected[step] for step in range(1, 5))
    passed = ended.code == 0 and equal and ended.fault_s is not None
    return [Row("clock jumps by +1 and -2 days", "rollout, save", passed, "went on, equal metrics")]


def taken_port(config: Path) -> list[Row]:
    """Another program uses the port at which the ranks must meet."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        meeting = {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(holder.getsockname()[1]), "FAULTS": "[]", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(INJECTED), "--config", str(config), "run.name=port"]
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | meeting,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    passed = (
        ended.returncode == 3 and len(lines) == 1 and "in use" in lines[0] and "Traceback" not in ended.stderr
    )
    return [Row("port taken", "start", passed, (lines or [ended.stderr[-400:]])[0][:200])]
