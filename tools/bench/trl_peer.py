"""Run TRL's GRPO trainer in another process, with the environment .venv-trl that `make setup-trl` creates."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import measure

PYTHON = measure.ROOT / ".venv-trl" / "bin" / "python"
NAME = "TRL's GRPOTrainer"


def is_there() -> bool:
    """Return whether TRL's environment exists. Print a line if it does not exist."""
    if not PYTHON.exists():
        print(f"skipping the rows of {NAME}: there is no {PYTHON.parents[1].name}; run make setup-trl")
    return PYTHON.exists()


def run(script: str, request: dict[str, Any], *, ranks: int = 1) -> dict[str, Any]:
    """Run a script in TRL's environment, and return its answer.

    The script receives the paths of two JSON files: it reads the request from the first, and writes its answer to the
    second. If `ranks` > 1, torchrun starts this number of processes, and rank 0 writes the answer.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer_file = Path(folder, "request.json"), Path(folder, "answer.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        measure.run_program(
            script,
            [
                PYTHON,
                *(launcher if ranks > 1 else []),
                Path(__file__).parent / script,
                request_file,
                answer_file,
            ],
            {
                "PYTHONPATH": str(measure.ROOT),
                "TRL_EXPERIMENTAL_SILENCE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        return json.loads(answer_file.read_text(encoding="utf-8"))
