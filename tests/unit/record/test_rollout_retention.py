"""Recorded rollouts stay within run.keep_rollouts_gb, and those that a run or a reader still needs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from a2tgpo.record.rollout_files import part_path, recorded_steps, step_ranges
from a2tgpo.record.rollout_retention import RolloutRetention

STEP_BYTES = 1000


def record(run: Path, *steps: int) -> None:
    for step in steps:
        for replica in range(2):
            path = part_path(run, step, replica=replica, num_replicas=2)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(STEP_BYTES // 2))


def kept(run: Path) -> list[int]:
    return list(recorded_steps(run))


def test_the_oldest_steps_go_and_every_hundredth_last(tmp_path, caplog):
    record(tmp_path, *range(95, 121))
    retention = RolloutRetention(tmp_path, keep_gb=15 * STEP_BYTES / 1e9)
    retention.trim(110)
    assert kept(tmp_path) == [100, *range(107, 121)]
    retention.trim(120)
    assert kept(tmp_path) == [100, *range(107, 121)]
    record(tmp_path, 121, 122)
    retention.trim(122)
    assert kept(tmp_path) == [100, *range(109, 123)]
    RolloutRetention(tmp_path, keep_gb=2 * STEP_BYTES / 1e9).trim(122)
    assert kept(tmp_path) == [100, 122]
    RolloutRetention(tmp_path, keep_gb=STEP_BYTES / 1e9).trim(122)
    assert kept(tmp_path) == [122]
    said = [record.message for record in caplog.records]
    assert len(said) == 3 and "run.keep_rollouts_gb" in said[0] and "first steps 95 to 106" in said[0], (
        "once each"
    )


def test_steps_that_no_checkpoint_covers_and_the_one_it_holds_stay(tmp_path):
    record(tmp_path, *range(1, 9))
    retention = RolloutRetention(tmp_path, keep_gb=STEP_BYTES / 1e9)
    retention.trim(5)
    assert kept(tmp_path) == [5, 6, 7, 8]


def test_a_step_that_was_written_again_after_a_checkpoint_counts_as_it_is_now(tmp_path):
    record(tmp_path, 1, 2, 3)
    retention = RolloutRetention(tmp_path, keep_gb=3 * STEP_BYTES / 1e9)
    retention.trim(1)
    part_path(tmp_path, 3, replica=0, num_replicas=2).write_bytes(bytes(2 * STEP_BYTES))
    retention.trim(3)
    assert kept(tmp_path) == [3]


def test_the_file_of_an_earlier_version_goes_like_a_folder(tmp_path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_1.jsonl.zst").write_bytes(bytes(STEP_BYTES))
    record(tmp_path, 2)
    RolloutRetention(tmp_path, keep_gb=STEP_BYTES / 1e9).trim(2)
    assert kept(tmp_path) == [2]


@pytest.mark.parametrize("keep_gb", [0.0, 1.0])
def test_without_a_limit_or_below_it_nothing_goes(tmp_path, keep_gb):
    record(tmp_path, 1, 2)
    RolloutRetention(tmp_path, keep_gb=keep_gb).trim(2)
    assert kept(tmp_path) == [1, 2]
    RolloutRetention(tmp_path / "no run", keep_gb=keep_gb).trim(2)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([7], "7"),
        ([100, 200, 301, 302, 303], "100, 200, 301 to 303"),
        (range(1, 20, 2), "1, 3, 5, 7, 9, ..., 19"),
    ],
)
def test_recorded_steps_are_told_as_ranges(steps, said):
    assert step_ranges(steps) == said
