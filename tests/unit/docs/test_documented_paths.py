"""All files and modules that pages and docstrings name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "a2tgpo"
TOP = {"a2tgpo", "configs", "docs", "launch", "slurm", "tests", "tools"}
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("a2tgpo", "launch", "tools", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
WRITTEN_BY_THE_READER = {
    "a2tgpo/advantage/methods/rloo.py",
    "a2tgpo/environment/tools/weekday.py",
    "configs/algorithm/rloo.yaml",
    "configs/my_70b.yaml",
}
NOT_SEARCHED = {"setup.py", "cpu_moe.py", "my_tools.py", "reinforce.py", "reweighted.py"}
"""A file at the root, a file of vLLM, and examples of a user's files."""


def missing(text: str) -> set[str]:
    """Return paths and dotted modules in backticks that do not exist. A path may begin at the root or in the
    package.
    """
    quoted = re.findall(r"`([^`\n]+)`", text)
    words = {word for code in quoted for word in code.split()}
    paths = {w for w in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/([\w-]+\.(py|sh|yaml|md|html))?", w)}
    paths = {path for path in paths if path.split("/")[0] in TOP | ROOMS} - WRITTEN_BY_THE_READER
    modules = {w.replace(".", "/") for w in words if re.fullmatch(r"a2tgpo(\.[a-z_]+)+(?<!\.yaml)", w)}
    absent = {path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()}
    return absent | {m for m in modules if not (ROOT / m).is_dir() and not (ROOT / f"{m}.py").is_file()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_on_a_page_exist(page):
    assert not missing(page.read_text(encoding="utf-8"))


def test_a_file_named_without_its_folder_exists():
    names = {path.name for path in SOURCES} | NOT_SEARCHED
    for page in PAGES:
        named = set(re.findall(r"`([\w-]+\.py)`", page.read_text(encoding="utf-8")))
        assert named <= names, page.name


def test_paths_in_docstrings_and_comments_exist():
    others = [path for path in SOURCES if path != Path(__file__)]
    absent = {str(p.relative_to(ROOT)): missing(p.read_text(encoding="utf-8")) for p in others}
    assert not {path: names for path, names in absent.items() if names}


def test_a_path_that_does_not_exist_is_found():
    assert missing("see `tools/fly.py`, `run/fly.py CONFIG` and `a2tgpo.run.fly`") == {
        *("tools/fly.py", "run/fly.py", "a2tgpo/run/fly")
    }
