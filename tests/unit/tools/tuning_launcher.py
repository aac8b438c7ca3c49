"""Stands in for launch/local.sh: writes a run's metrics, whose reward has its peak at a known setting.

    python tuning_launcher.py -n RANKS CONFIG [FILE.yaml | section.field=value ...]

Only in the second half of the run does the reward fall with the distance of lr from 2e-4 and of clip_low from 0.1.
Every start adds a line to starts.txt. Runs whose name contains the text in the variable FAILS end with an error.
"""

import json
import math
import os
import sys
from pathlib import Path

from a2tgpo.config.load import dump_config, load_config


def main(arguments: list[str]) -> int:
    config = load_config(arguments[2], arguments[3:])
    root = Path(config.run.root)
    with (root / "starts.txt").open("a") as file:
        file.write(f"{config.run.name}\n")
    if "FAILS" in os.environ and os.environ["FAILS"] in config.run.name:
        return 3
    folder = root / config.run.name
    (folder / "config.yaml").write_text(dump_config(config))
    peak = -abs(math.log(config.update.lr / 2e-4)) - abs(math.log(config.algorithm.clip_low / 0.1))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, config.run.steps + 1):
            reward = -peak if step <= config.run.steps // 2 else peak
            file.write(json.dumps({"step": step, "reward/mean": reward}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
