"""The date of a run is set at its first start and stored in its folder, and every later replay uses it."""

import datetime

import pytest
from saved_run import Run, world

from a2tgpo.data.template import today
from a2tgpo.io.errors import ConfigError
from a2tgpo.run import date as run_date
from a2tgpo.run import folder as run_folder

__all__ = ["world"]
FIRST_DAY, LATER = datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets today's date."""

    def set_to(date: datetime.date) -> None:
        monkeypatch.setattr(run_folder, "today", lambda: date)
        monkeypatch.setattr(run_date, "today", lambda: date)

    return set_to


def test_a_run_keeps_the_date_of_its_first_start_and_a_new_one_takes_its_own(world, tmp_path, clock):
    clock(FIRST_DAY)
    run = Run(world, tmp_path)
    assert run_date.run_date(run.config, world.groups) == FIRST_DAY
    clock(LATER)
    resumed = Run(world, tmp_path)
    assert run_date.run_date(resumed.config, world.groups) == FIRST_DAY == run_date.read_date(run.folder.path)
    assert run_date.run_date(Run(world, tmp_path, resume="none").config, world.groups) == LATER
    assert run_date.read_date(run.folder.path) == LATER


def test_before_the_first_start_it_is_today_and_nothing_is_written(world, tmp_path, clock):
    config = Run(world, tmp_path).config
    (tmp_path / "r" / run_date.FILE).unlink()
    clock(LATER)
    assert run_date.run_date(config, world.groups) == LATER
    assert run_date.read_date(tmp_path / "r") is run_date.read_date(tmp_path / "none") is None


def test_a_file_without_a_date_is_refused_in_one_line_by_all_that_read_it(world, tmp_path):
    run = Run(world, tmp_path)
    path = run.folder.path / run_date.FILE
    for text in ("", "yesterday", "2024-13-01"):
        path.write_text(text)
        for read in (lambda: run_date.run_date(run.config, world.groups), lambda: Run(world, tmp_path)):
            with pytest.raises(ConfigError, match=r"date\.txt: cannot be read \(not a date like") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_today_is_a_date_in_utc():
    now = datetime.datetime.now(datetime.UTC)
    assert today() in (now.date(), (now + datetime.timedelta(minutes=1)).date())
