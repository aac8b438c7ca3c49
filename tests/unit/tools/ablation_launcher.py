"""Stands in for launch/local.sh: writes a run's files with made-up scores in a second, without training.

    python ablation_launcher.py -n RANKS [--script PROGRAM] CONFIG [FILE.yaml | section.field=value ...]

With --script it writes a model's folder, as launch/warmstart.py does. The run that the variable FAILS names
(NAME:STEP) ends with an error after this step. MEETS names two runs, each of which waits until the other has started.
"""

import json
import os
import sys
import time
from pathlib import Path

from a2tgpo.config.load import dump_config, load_config
from a2tgpo.metrics.writer import read_metrics


def main(arguments: list[str]) -> int:
    assert arguments[0] == "-n"
    if arguments[2] == "--script":
        config = load_config(arguments[4], arguments[5:])
        assert Path(config.warmstart.source, "config.json").exists()
        Path(config.model.path).mkdir()
        (Path(config.model.path) / "config.json").write_text("{}")
        return 0
    config = load_config(arguments[2], arguments[3:])
    if Path(config.model.path).name == "model":
        assert Path(config.model.path, "config.json").exists(), "a run begins before its warm start has ended"
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    wait_for([folder.with_name(name) for name in os.environ.get("MEETS", "").split(",") if name])
    fails = os.environ.get("FAILS", "").partition(":")
    done = read_metrics(folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(done[-1]["step"] + 1 if done else 0, config.run.steps + 1):
            score = {"evaluation/em": 0.25 + 0.125 * step, "evaluation/num_questions": 8}
            file.write(json.dumps({"step": step, **score}) + "\n")
            if fails[0] == config.run.name and step == int(fails[2]):
                print("error: the engine is lost", flush=True)
                print("a warning on the way out", flush=True)
                return 3
    return 0


def wait_for(folders: list[Path]) -> None:
    limit = time.monotonic() + 60
    while not all((folder / "config.yaml").exists() for folder in folders):
        if time.monotonic() > limit:
            raise TimeoutError("the other run was not started")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
