"""The folder of an evaluation's report, which replaces an older report and nothing else."""

from pathlib import Path

import evaluate
import pytest

from a2tgpo.io.errors import ConfigError


@pytest.mark.parametrize("name", ["", "..", "notes", "notes/one.txt"])
def test_a_folder_that_is_no_report_is_never_replaced(tmp_path: Path, monkeypatch, name: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text("kept")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"--out: .* is no report, and a report would replace it as a whole; give a"
    ):
        evaluate.require_replaceable(Path(name))


def test_a_new_folder_an_empty_folder_and_an_older_report_are_taken(tmp_path: Path) -> None:
    for name in ("empty", "older"):
        (tmp_path / name).mkdir()
    (tmp_path / "older" / evaluate.REPORT).write_text("{}")
    for name in ("new", "empty", "older"):
        evaluate.require_replaceable(tmp_path / name)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["empty", "older", f"older/{evaluate.REPORT}"], "the check itself changes nothing"
