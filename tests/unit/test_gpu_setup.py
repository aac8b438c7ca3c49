"""What `make setup-gpu` and slurm/Dockerfile install, in which order and in which environment.

Nothing is installed here. The tests read the commands that `make -n` prints.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {"cpu": "3.11", "gpu": "3.12"}
"""The Python version for each extra of setup.py that a constraints file pins."""


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An outer `make test` would pass its variables to this make.
    mine = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=mine, capture_output=True, text=True, timeout=60, check=False
    )


def pins(kind: str = "gpu") -> dict[str, str]:
    text = (ROOT / ".ci" / f"constraints-{kind}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines) and list(found) == sorted(found)
    return found


def requirements(kind: str, monkeypatch) -> list[Requirement]:
    """Return the requirements of setup.py with its extras `kind` and dev."""
    told: dict = {}
    monkeypatch.setattr("setuptools.setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    texts = [*told["install_requires"], *told["extras_require"][kind], *told["extras_require"]["dev"]]
    found = [Requirement(text) for text in texts]
    python = {"python_version": PYTHONS[kind], "python_full_version": f"{PYTHONS[kind]}.3"}
    return [each for each in found if each.marker is None or each.marker.evaluate(python)]


@pytest.mark.parametrize("kind", PYTHONS)
def test_every_version_of_the_constraints_is_one_that_setup_py_allows(kind, monkeypatch):
    pinned = pins(kind)
    wanted = requirements(kind, monkeypatch)
    if kind == "cpu":  # setup.py names a version of it for each Python version
        wanted = [each for each in wanted if each.name != "megatron-core"]
        assert "megatron-core" not in pinned
    assert len(wanted) > 30
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name), "none")
        assert version != "none" and requirement.specifier.contains(version), (
            f"{requirement}: {version} is pinned"
        )


def test_what_compiles_kernels_is_of_the_same_cuda_as_torchs_libraries():
    pinned = pins()
    names = [
        *("cuda-toolkit", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc"),
        *("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl"),
    ]
    assert {Version(pinned[name]).release[:2] for name in names} == {(13, 0)}


@pytest.fixture(scope="module")
def steps() -> list[str]:
    done = make("-n", "setup-gpu", "VENV=/new/venv", "PYTHON312=/a/python3.12")
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


def test_torch_is_installed_before_the_extension_that_is_compiled_against_it(steps):
    wanted = [
        r"^/a/python3\.12 -m venv /new/venv$",
        r"/bin/python -m pip .* install .* setuptools wheel .* torch .*cuda-toolkit\[cccl,crt,nvcc\]",
        r"/bin/python -m pip .* install .*\btransformer-engine-torch$",
        r"/bin/python -m pip .* install .* -e \"\.\[gpu,dev\]\"$",
    ]
    order = [next(i for i, line in enumerate(steps) if re.search(pattern, line)) for pattern in wanted]
    assert order == sorted(order)
    installs = [line for line in steps if re.search(r" -m pip .* install ", line)]
    assert len(installs) == 3 and all("--constraint .ci/constraints-gpu.txt" in line for line in installs)


def test_the_extension_is_built_against_this_torch_by_headers_of_wheels(steps):
    (build,) = [line for line in steps if line.endswith("transformer-engine-torch")]
    environment, _, command = build.partition("/new/venv/bin/python ")
    told = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', environment))
    assert told["NVTE_BUILD_USE_NVIDIA_WHEELS"] == "1" and told["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"
    assert told["NVTE_FRAMEWORK"] == "pytorch" and told["PATH"].startswith('"/new/venv/bin:')
    for option in ("--no-build-isolation", "--no-cache-dir", "--force-reinstall", "--no-deps"):
        assert option in command.split()


@pytest.mark.parametrize("python", ["", "/nowhere/python3.12", sys.executable])
def test_without_a_python_3_12_one_line_says_what_to_do(tmp_path, python):
    if python == sys.executable and sys.version_info[:2] == (3, 12):
        pytest.skip("this is Python 3.12")
    for target, name in {"setup-gpu": "VENV", "setup-py312": "VENV312"}.items():
        folder = tmp_path / target
        done = make(target, f"PYTHON312={python}", f"{name}={folder}")
        assert done.returncode == 2 and not folder.exists()
        line, end = done.stderr.splitlines()
        assert line == "There is no Python 3.12 here: install python3.12, or name one with PYTHON312=PATH"
        assert end.startswith("make: ***")


def test_neither_environment_is_installed_over_the_other(tmp_path):
    (tmp_path / ".ready").touch()
    # Any command can stand in for Python 3.12, because it is not used.
    done = make("setup-gpu", f"VENV={tmp_path}", "PYTHON312=true")
    assert done.returncode == 2 and f"{tmp_path} holds the CPU packages: remove it" in done.stderr
    (tmp_path / ".ready").unlink()
    (tmp_path / ".ready-te").touch()
    (tmp_path / ".ready-gpu").touch()
    done = make("-n", "setup", f"VENV={tmp_path}")
    assert done.returncode == 0 and "install" not in done.stdout


def test_the_image_is_made_by_the_same_target_and_has_the_toolkit_of_torchs_cuda():
    text = (ROOT / "slurm" / "Dockerfile").read_text()
    instructions = re.sub(r"\\\n", " ", text)
    assert "pip install" not in instructions
    runs = re.findall(r"^RUN .*\bmake (\S+)$", instructions, re.MULTILINE)
    assert runs == ["$VENV/.ready-te", "setup-gpu"]
    assert re.search(r"^ENV .*\bCUDA_HOME=/usr/local/cuda\b", instructions, re.MULTILINE)
    (toolkit,) = re.findall(r"^FROM nvidia/cuda:([\d.]+)-devel-", instructions, re.MULTILINE)
    assert Version(toolkit).release[:2] == Version(pins()["cuda-toolkit"]).release[:2]
    copied = {
        name for line in re.findall(r"^COPY (.*) \S+$", instructions, re.MULTILINE) for name in line.split()
    }
    assert copied >= {"Makefile", ".ci/constraints-gpu.txt", "setup.py", "pyproject.toml", "README.md"}


def test_constraints_are_written_from_what_pip_resolved(tmp_path):
    found = {"A2tgpo": "0.1.0", "torch": "2.13.0", "transformer_engine.Torch": "2.20.2"}
    report = {
        "install": [{"metadata": {"name": name, "version": version}} for name, version in found.items()]
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    out = tmp_path / "constraints.txt"
    program = str(ROOT / ".ci" / "write_constraints.py")
    subprocess.run([sys.executable, program, str(tmp_path / "report.json"), str(out)], check=True, timeout=60)
    assert out.read_text().splitlines()[-2:] == ["torch==2.13.0", "transformer-engine-torch==2.20.2"]
