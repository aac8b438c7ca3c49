"""The package, installed from a wheel outside its checkout."""

import email
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, a2tgpo
from a2tgpo.run.versions import commit
for module in pkgutil.walk_packages(a2tgpo.__path__, "a2tgpo."):
    importlib.import_module(module.name)
print(a2tgpo.__path__[0], commit())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel's files, inside another git repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "a2tgpo", source / "a2tgpo", ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "repository" / "site-packages"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", str(target.parent)]
    for command in (
        ["git", "init", "-q", str(target.parent)],
        [*git, "commit", "-q", "--allow-empty", "-m", "theirs"],
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-index",
         "--no-build-isolation", "--target", str(target), str(source)],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_holds_the_package_its_data_and_nothing_else(installed):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "a2tgpo").rglob("*") if path.is_file()}
    found = {path.relative_to(installed) for path in (installed / "a2tgpo").rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix != ".pyc"} == {
        path for path in wanted if path.suffix != ".pyc"
    }
    others = {path.name for path in installed.iterdir()} - {"a2tgpo"}
    assert len(others) == 1 and others.pop().startswith("a2tgpo-")


def test_the_metadata_are_those_of_the_citation_file(installed):
    (folder,) = installed.glob("a2tgpo-*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {metadata['Version']}\n" in citation
    assert f'name: "{metadata["Author"]}"' in citation
    assert f"## {metadata['Version']} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_module_is_imported_from_elsewhere_and_claims_no_commit(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{installed / 'a2tgpo'} unknown"
