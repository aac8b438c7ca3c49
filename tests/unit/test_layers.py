"""The shape of the package: which layer may import which, and where the big libraries may appear."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "a2tgpo"

# Lower numbers are further down; a module imports its own package and what lies below.
LAYER = {
    "atomic_file": 0,
    "error_line": 0,
    "trajectory": 0,
    "residency": 0,
    "config": 0,
    "stop_signal": 0,
    "parallel": 1,
    "metrics": 1,
    "record": 2,
    "data": 2,
    "search": 2,
    "batch": 2,
    "plan": 2,
    "environment": 3,
    "model": 4,
    "rollout": 4,
    "reward": 4,
    "advantage": 4,
    "loss": 4,
    "update": 5,
    "refit": 5,
    "evaluate": 5,
}
TOP = 6
"""trainer.py and the modules beside it, which may import each other."""
ALLOWED_IN = {
    "vllm": {"rollout/vllm_engine.py"},
    "transformer_engine": {"model/precision.py"},
    "megatron": {"parallel", "model", "update", "refit"},
    "mbridge": {"model"},
    "torch": None,
}
# config.load puts sections together; batch reads prompts' records: both are named by the layers above.
SAME_LAYER_ALLOWED = {("config", "trajectory"), ("stop_signal", "config")}

FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> list[str]:
    """Modules imported anywhere in the file, except for type checking only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [
                f"{node.module}.{alias.name}" if node.module == "a2tgpo" else str(node.module)
                for alias in node.names
            ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    own_layer = LAYER.get(own, TOP)
    for module in imports_of(path):
        top = module.split(".")[0]
        if top in ALLOWED_IN and ALLOWED_IN[top] is not None:
            assert str(relative) in ALLOWED_IN[top] or own in ALLOWED_IN[top], f"{relative} imports {module}"
        if top != "a2tgpo" or module == "a2tgpo":
            continue
        other = package_of(module)
        if other == own or (own, other) in SAME_LAYER_ALLOWED:
            continue
        other_layer = LAYER.get(other, TOP)
        assert other_layer < own_layer or own_layer == other_layer == TOP, f"{relative} imports {module}"


def test_configuration_can_be_read_without_torch():
    import subprocess
    import sys

    code = "import sys, a2tgpo.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_is_a_drawer_for_leftovers():
    names = {path.stem for folder in ("a2tgpo", "launch", "tools") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


def test_the_training_loop_stays_short():
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) < 200
