"""The warm starts of a comparison: one initial policy for each seed, from which every method starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The warm start of one seed: supervised training of a tiny model whose random weights depend on the seed.

    The models of two seeds differ in their initial weights and in the order of their demonstrations. An interrupted
    warm start is resumed.
    """

    seed: int
    out: Path
    """The comparison's folder, DIR."""

    @property
    def name(self) -> str:
        return f"warm-start-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / "warm_starts" / f"seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def model(self) -> Path:
        """The initial policy of the runs with this seed."""
        return self.folder / "model"

    @property
    def is_finished(self) -> bool:
        return (self.model / "config.json").exists()

    def command(
        self, launcher: Sequence[str], config: str, *, data: Path, overrides: Sequence[str]
    ) -> list[str]:
        """Return the command that makes the model and trains it.

        Args:
            data: folder of the data set, from whose texts the tokenizer is learned.
        """
        source = self.folder / "source"
        tool = str(ROOT / "tools" / "prepare_model.py")
        make = [
            sys.executable,
            tool,
            "tiny",
            "--data",
            str(data),
            "--seed",
            str(self.seed),
            "--out",
            str(source),
        ]
        own = {
            "run.name": self.name,
            "run.root": self.folder,
            "run.seed": self.seed,
            "warmstart.source": source,
            "model.path": self.model,
        }
        settings = [f"{key}={value}" for key, value in own.items()]
        script = str(ROOT / "launch" / "warmstart.py")
        train = [*launcher, "-n", "1", "--script", script, config, *settings, *overrides]
        is_made = shlex.join(["test", "-e", str(source / "config.json")])
        return ["sh", "-c", f"{is_made} || {shlex.join(make)} && exec {shlex.join(train)}"]
