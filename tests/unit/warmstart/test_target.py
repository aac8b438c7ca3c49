"""A warm start may overwrite only files that a warm start has written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.warmstart.target import MARKER, require_target
from launch import warmstart


def arguments(folder: Path, target: str) -> list[str]:
    return [
        *("configs/quickstart.yaml", f"run.root={folder / 'runs'}", f"model.path={folder / target}"),
        *(f"warmstart.source={folder / 'base'}", f"warmstart.demonstrations={folder / 'data' / 'd.jsonl'}"),
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("base", "data", "made", "other", "empty"):
        (tmp_path / name).mkdir()
    for name in ("base/model.safetensors", "data/d.jsonl", "other/model.safetensors", f"made/{MARKER}"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "link_to_link").symlink_to(tmp_path / "link")
    (tmp_path / "base" / "inner").mkdir()
    os.link(tmp_path / "base" / "model.safetensors", tmp_path / "file")
    return tmp_path


@pytest.mark.parametrize("target", ["new", "made", "empty", "deep/new"])
def test_a_new_folder_and_one_of_a_warm_start_may_be_written(folder, target) -> None:
    path, *overrides = arguments(folder, target)
    before = sorted(folder.rglob("*"))
    require_target(load_config(path, overrides))
    assert sorted(folder.rglob("*")) == before, "the check itself writes nothing"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("base", "outside warmstart.source"),
        ("link", "outside warmstart.source"),
        ("link_to_link", "outside warmstart.source"),
        ("other/../base", "outside warmstart.source"),
        ("base/inner", "outside warmstart.source"),
        ("", "outside warmstart.source"),
        ("data", "outside warmstart.demonstrations"),
        ("runs", "outside run.root's folder"),
        ("other", f"it was not written by a warm start (it has no {MARKER})"),
        ("file", "a folder, which a warm start writes"),
    ],
)
def test_another_target_is_refused_in_one_line_before_anything_is_written(
    folder, target, message, monkeypatch, capsys
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr("sys.argv", ["launch/warmstart.py", "--config", *arguments(folder, target)])
    assert warmstart.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.path is ") and message in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_seen_under_two_names_is_one(folder, monkeypatch) -> None:
    monkeypatch.setattr(
        os.path, "samefile", lambda one, other: {Path(one).name, other.name} == {"base", "new"}
    )
    path, *overrides = arguments(folder, "new")
    with pytest.raises(ConfigError, match=r"outside warmstart\.source"):
        require_target(load_config(path, overrides))
