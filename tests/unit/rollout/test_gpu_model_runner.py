"""The same tests run on vLLM's model runner for GPUs, whose Triton kernels are interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
TRITON = Path(sys.prefix) / "triton"


@pytest.mark.skipif(not (TRITON / "triton").is_dir(), reason="needs Triton in .venv/triton (make test)")
def test_generation_scores_and_refit_are_right_on_the_runner_of_gpus():
    # Only the first engine of a process creates vLLM's group for experts, so a model with experts comes first.
    names = ("test_engine_experts.py", "test_vllm_engine.py", "test_engine_work.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    paths = [str(TESTS.parent), str(TESTS), str(TRITON), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-p", "triton_interpreter", "-p", "no:cacheprovider"]
    # The test of importing starts a process of its own, in which no engine runs.
    command += ["-k", "not importing_vllm"]
    done = subprocess.run(
        [*command, *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "1 deselected" in done.stdout, done.stdout
    assert "F" not in done.stdout and re.search(r"\.{20}", done.stdout), done.stdout
