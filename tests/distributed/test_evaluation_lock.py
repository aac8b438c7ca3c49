"""Kill only the launcher of an evaluation. Its ranks go on, and a second start must leave them alone."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from preloaded.command import PYTHON
from ranks import DISTRIBUTED, OF_A_LAUNCHER
from tiny_models import save_tiny

from a2tgpo.io.exit_codes import BAD_CONFIG

LONGEST_S = 600
QUESTIONS = [f"question {number}" for number in range(4)]


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come within {LONGEST_S} s")
        time.sleep(0.05)


def test_ranks_that_lost_their_launcher_keep_a_second_evaluation_from_asking_again(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen3")
    records = [{"id": text, "question": text, "answers": ["Rome"]} for text in QUESTIONS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: {tmp_path}/model, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/test.jsonl, test: {tmp_path}/test.jsonl}}\n"
        f"run: {{root: {tmp_path}/runs, name: held}}\n"
        "search: {backend: http, url: http://127.0.0.1:9/retrieve}\n"
        "rollout: {kv_cache_gib: 0.1}\n"
    )
    out, asked, gate = tmp_path / "out", tmp_path / "asked", tmp_path / "gate"
    partial = tmp_path / "out.partial"
    command = [PYTHON, "-m", "a2tgpo.launch.local_ranks", "2", str(DISTRIBUTED / "evaluation_worker.py")]
    command += ["--config", str(tmp_path / "config.yaml"), "--checkpoint", str(tmp_path / "model")]
    command += ["--out", str(out)]
    variables = {k: v for k, v in os.environ.items() if k not in OF_A_LAUNCHER} | {"ASKED": str(asked)}
    tools = str(DISTRIBUTED.parents[1] / "tools")
    variables["PYTHONPATH"] = os.pathsep.join([tools, variables["PYTHONPATH"]])
    with open(tmp_path / "output", "w") as output:
        first = subprocess.Popen(
            command, env={**variables, "GATE": str(gate)}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for(
            lambda: first.poll() is not None or (asked.exists() and len(asked.read_text().splitlines()) == 4)
        )
        assert first.poll() is None, (tmp_path / "output").read_text()
        first.kill()
        first.wait()
        again = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
        assert again.returncode == BAD_CONFIG, again.stdout + again.stderr
        holder = json.loads((partial / "holder.json").read_text())["pid"]
        assert f"error: --out: {partial} is in use by process {holder} on " in again.stderr
        assert "end that run first, or choose another --out" in again.stderr
    finally:
        gate.touch()
    wait_for(lambda: not partial.exists())
    assert json.loads((out / "report.json").read_text())["average"]["num_questions"] == len(QUESTIONS)
    assert sorted(asked.read_text().splitlines()) == QUESTIONS
