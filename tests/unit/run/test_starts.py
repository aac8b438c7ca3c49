"""How a start is compared with the previous one, why it is refused, and what a job continues with."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from a2tgpo.config.load import dump_config, flat_config, load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.arguments import parse_start, start_parser
from a2tgpo.run import versions
from a2tgpo.run.environment import describe_environment, environment_changes, parse_environment
from a2tgpo.run.job import keep, load_as_started
from a2tgpo.run.resume import changed_files, changed_settings
from a2tgpo.run.rules import TRAINING, WARM_START, Rules, settings_of
from a2tgpo.run.starts import difference, record_start, require_same

QUICKSTART = "configs/quickstart.yaml"
CLEAN, DIRTY = "1" * 40, "1" * 40 + versions.UNCOMMITTED


def started(folder: Path, *overrides: str, **environment: str) -> Path:
    """Record a start with these overrides in `folder`, replace recorded values by those of `environment`, return
    `folder`.
    """
    record_start(folder, load_config(QUICKSTART, overrides))
    path = max(folder.glob("env.*.txt"))
    told = parse_environment(path.read_text()) | environment
    path.write_text("".join(f"{name} {value}\n" for name, value in told.items()))
    return folder


@pytest.mark.parametrize("rules", [TRAINING, WARM_START])
def test_every_rule_names_settings_that_there_are(rules: Rules) -> None:
    keys = list(flat_config(load_config(QUICKSTART)))
    for prefix in rules.used + rules.free:
        assert any(key.startswith(prefix) for key in keys), prefix


def test_a_training_compares_every_section_but_the_warm_starts() -> None:
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    assert {prefix.rstrip(".") for prefix in TRAINING.used} == sections - {"warmstart"}


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("update.lr=1e-5", True),
        ("parallel.tensor=2", True),
        ("data.chat_template_kwargs={a: 1}", True),
        ("run.seed=1", True),
        ("run.steps=64", False),
        ("checkpoint.every=3", False),
        ("watchdog.other_s=9", False),
        ("search.request_timeout_s=9", False),
        ("run.name=other", None),
        ("warmstart.steps=9", None),
    ],
)
def test_a_changed_setting_is_refused_said_or_of_no_account(tmp_path, override, is_refused) -> None:
    found = difference(started(tmp_path), load_config(QUICKSTART, [override]), TRAINING)
    key = override.partition("=")[0]
    assert (list(found.refused), list(found.reported)) == {
        True: ([key], []),
        False: ([], [key]),
        None: ([], []),
    }[is_refused]


def test_the_length_of_a_run_may_not_change_where_the_learning_rate_decays_over_it(tmp_path) -> None:
    decays = ["update.lr_schedule=cosine"]
    found = difference(
        started(tmp_path, *decays), load_config(QUICKSTART, [*decays, "run.steps=9"]), TRAINING
    )
    assert found.refused == {"run.steps": (32, 9)}


def test_a_setting_that_an_earlier_version_did_not_know_is_no_change(tmp_path) -> None:
    sections = yaml.safe_load((started(tmp_path) / "config.yaml").read_text())
    del sections["update"]["clip_grad"]
    sections["update"]["of_another_version"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    assert not difference(tmp_path, load_config(QUICKSTART), TRAINING).refused


def test_a_run_of_an_earlier_version_goes_on_under_the_new_names_of_its_settings(tmp_path) -> None:
    sections = yaml.safe_load((started(tmp_path) / "config.yaml").read_text())
    tools = sections.pop("tools")
    sections["tools"] = {"names": ",".join(tools["names"])}
    sections["search"] |= {"max_passage_tokens": tools["max_part_tokens"], "num_workers": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    found = difference(tmp_path, load_config(QUICKSTART), TRAINING)
    assert found.refused == {} and found.reported == {"tools.max_concurrent_calls": (3, 16)}
    other = load_config(QUICKSTART, ["tools.max_part_tokens=7", "tools.names=[search,calculator]"])
    assert difference(tmp_path, other, TRAINING).refused == {
        "tools.max_part_tokens": (96, 7),
        "tools.names": ("search", "search,calculator"),
    }


def test_settings_of_an_earlier_checkpoint_are_compared_by_their_new_names() -> None:
    config = load_config(QUICKSTART, ["tools.max_part_tokens=7"])
    saved = {"search.max_passage_tokens": 96, "tools.names": "search", "search.timeout_s": 30.0}
    assert changed_settings({"settings": saved}, settings_of(config)) == {"tools.max_part_tokens": (96, 7)}


def test_a_file_that_changed_since_a_checkpoint_is_named(tmp_path) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def short(episode):\n    return 1.0\n")
    config = load_config(QUICKSTART, [f"reward.names=['{reward}:short', em]"])
    state = {"step": 3, "settings": settings_of(config)}
    (tmp_path / "state.json").write_text(
        json.dumps({"schedule": {"steps_done": 3}, "layout": {}, "state": state})
    )
    assert changed_files(tmp_path, config) == []
    reward.write_text("def short(episode):\n    return 0.0\n")
    (line,) = changed_files(tmp_path, config)
    assert line.startswith(f"reward.names[0]=mine.py has changed since {tmp_path.name} was written")
    assert state["settings"]["file:reward.names[0]=mine.py"] in line


def test_a_refusal_says_whose_run_it_is_what_differs_and_what_to_do(tmp_path) -> None:
    started(tmp_path, user="alice", job="88", date="2026-11-20T10:00:00+00:00")
    with pytest.raises(ConfigError) as caught:
        require_same(
            tmp_path,
            load_config(QUICKSTART, ["update.lr=1e-5", "algorithm.advantage=grpo"]),
            TRAINING,
            accept=False,
            done="at step 140",
        )
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"run.name: {tmp_path} is ")
    for part in (
        "a run that alice started on 2026-11-20 (Slurm job 88), at step 140",
        "update.lr 0.0002 -> 1e-05",
        "another run.name",
        "--accept-changes",
        "--resume none",
    ):
        assert part in message, message


def test_a_record_that_is_damaged_is_one_line(tmp_path) -> None:
    (started(tmp_path) / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: not a readable configuration"):
        difference(tmp_path, load_config(QUICKSTART), TRAINING)


@pytest.mark.parametrize(
    ("before", "now", "refused", "said"),
    [
        ({}, {}, [], []),
        ({"torch": "2.13"}, {"torch": "2.14"}, ["torch"], []),
        ({"host": "n1", "date": "1"}, {"host": "n2", "date": "2"}, [], []),
        ({"commit": CLEAN}, {"commit": "2" * 40}, [], []),  # the same code
        ({"commit": CLEAN, "code": "a"}, {"commit": "2" * 40, "code": "b"}, ["code"], []),
        ({"commit": CLEAN, "code": "a"}, {"commit": DIRTY, "code": "b"}, ["code"], []),
        ({"commit": DIRTY, "code": "a"}, {"commit": DIRTY, "code": "b"}, [], ["code"]),
        ({"commit": "unknown", "code": "a"}, {"commit": "unknown", "code": "b"}, [], ["code"]),
    ],
)
def test_packages_and_committed_code_are_held_to_and_a_developers_code_is_only_said(
    before, now, refused, said
) -> None:
    usual = parse_environment(describe_environment()) | {"commit": CLEAN, "code": "a"}
    found = environment_changes(usual | before, usual | now)
    assert (list(found[0]), list(found[1])) == (refused, said)


def test_what_runs_is_named_by_its_content_and_a_copy_by_the_commit_it_was_made_of(
    tmp_path, monkeypatch
) -> None:
    copy = tmp_path / "copy"
    for name in versions.CODE:
        shutil.copytree(Path(name), copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / versions.COMMIT_FILE).write_text(f"{DIRTY}\n")
    here = versions.code_fingerprint()
    code = "from a2tgpo.run.versions import *; print(commit(), commit_line(), code_fingerprint(), sep='\\n')"

    def seen() -> list[str]:
        command = ["python3", "-c", code]
        return subprocess.run(
            command, cwd=copy, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert seen() == [CLEAN, DIRTY, here]
    with (copy / "launch" / "train.py").open("a") as stream:
        stream.write("# another\n")
    assert seen()[2] != here


def test_a_job_goes_on_with_the_files_of_its_first_start_and_its_own_arguments(tmp_path, caplog) -> None:
    config, preset, kept = tmp_path / "run.yaml", tmp_path / "preset.yaml", tmp_path / "job" / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text())
    preset.write_text("update: {lr: 2.0e-5}\n")
    arguments = ["update.lr=1e-5", str(preset), "search.url=http://a/b"]
    first = load_as_started(kept, str(config), arguments, is_reporter=True)
    assert first.update.lr == 2e-5
    keep(kept, first)
    config.write_text(Path(QUICKSTART).read_text().replace("name: quickstart", "name: second"))
    preset.write_text("update: {lr: 9.0e-5}\n")
    with caplog.at_level(logging.WARNING):
        again = load_as_started(
            kept, str(config), [*arguments[:2], "search.url=http://c/d"], is_reporter=True
        )
    assert again == dataclasses.replace(first, search=dataclasses.replace(first.search, url="http://c/d"))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "run.name 'quickstart' -> 'second', update.lr 2e-05 -> 9e-05" in line and "are ignored" in line
    keep(kept, again)
    assert kept.read_text() == dump_config(first)
    preset.unlink()
    assert load_as_started(kept, str(config), arguments, is_reporter=True) == first
    assert "can no longer be loaded: no configuration file" in caplog.text


def test_a_job_that_is_started_again_does_not_begin_anew_or_accept_changes_again(
    tmp_path, monkeypatch
) -> None:
    kept = tmp_path / "config.yaml"
    said = ["train.py", "--config", QUICKSTART, "--as-started", str(kept), "run.steps=3", "--resume", "none"]
    monkeypatch.setattr("sys.argv", [*said, "--accept-changes"])

    def seen() -> tuple[str, bool, list[str]]:
        args = parse_start(start_parser("a program", resume="PATH"))
        return args.resume, args.accept_changes, args.overrides

    assert seen() == ("none", True, ["run.steps=3"])
    kept.touch()
    assert seen() == ("auto", False, ["run.steps=3"])


def test_a_file_of_the_user_is_kept_and_a_changed_one_is_refused(tmp_path) -> None:
    reward = tmp_path / "my.py"
    reward.write_text("def f(episode): return 1\n")
    overrides = [f"reward.names=[em, {reward}:f]"]
    folder = tmp_path / "run"
    folder.mkdir()
    started(folder, *overrides)
    config = load_config(QUICKSTART, overrides)
    assert difference(folder, config, TRAINING).refused == {}
    reward.write_text("def f(episode): return 2\n")
    (key, (before, now)), *others = difference(folder, config, TRAINING).refused.items()
    assert key == "file:reward.names[1]=my.py" and before != now and not others
    started(folder, *overrides)
    kept = [path.read_text() for path in folder.glob("plugins/my.*.py")]
    assert sorted(kept) == ["def f(episode): return 1\n", "def f(episode): return 2\n"]
