"""Which folders of the package may import which, and where large libraries may be imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "a2tgpo"

ORDER = (
    *("io", "trajectory", "config", "parallel", "metrics", "lifecycle", "net"),
    *("data", "protocol", "reward", "search", "batch", "environment", "loss", "advantage"),
    *("model", "memory", "plan", "rollout", "record", "update", "refit", "checkpoint"),
    *("evaluate", "collect", "run", "warmstart", "assemble", "trainer", "serve", "launch"),
)
"""Folders and modules of the package. Each may import only itself and earlier entries, also for types."""
ALLOWED_IN = {
    "vllm": {"rollout/vllm_engine.py"},
    "transformer_engine": {"model/precision.py"},
    "megatron": {"parallel", "model", "update", "refit", "checkpoint"},
    "mbridge": {"model"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    """Return the modules that the file imports anywhere, including imports only for type checking."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [
                f"{node.module}.{alias.name}" if node.module == "a2tgpo" else str(node.module)
                for alias in node.names
            ]
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    below = ORDER[: ORDER.index(own) + 1]
    for module in imports_of(path):
        top = module.split(".")[0]
        allowed = ALLOWED_IN.get(top, {own})
        assert str(relative) in allowed or own in allowed, f"{relative} imports {module}"
        if module.startswith("a2tgpo."):
            assert room_of(module) in below, f"{relative} imports {module}"


def test_every_module_lies_in_a_room():
    assert len(list(PACKAGE.glob("*.py"))) <= 5
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "py.typed"}
    assert rooms - {"__init__", "__pycache__"} == set(ORDER)


def test_the_design_page_lists_the_rooms_in_order():
    layers = (
        (ROOT / "docs/design.md").read_text().split("## Layers")[1].split("Four choices in this table")[0]
    )
    assert re.findall(r"^\| `(\w+)` \|", layers, re.MULTILINE) == list(ORDER)


def test_configuration_can_be_read_without_torch():
    code = "import sys, a2tgpo.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_changes_where_python_looks_for_modules():
    changes = [
        path
        for folder in ("a2tgpo", "launch", "tools", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"sys\.path\b", path.read_text())
        and path != ROOT / "tests/preloaded/server.py"  # sets it as Python itself does when a program starts
    ]
    assert not changes


def test_no_module_is_a_drawer_for_leftovers():
    names = {path.stem for folder in ("a2tgpo", "launch", "tools") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
