"""A function from a user's file: which files can be loaded, and the one-line errors for all others."""

from pathlib import Path

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.user_code import digest, fault_line, is_user_code, load_user_code

KEY = "reward.names"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_two_names_of_one_file_share_its_module(tmp_path):
    path = write(tmp_path, "calls = []\ndef first(): calls.append(1)\ndef second(): return calls\n")
    load_user_code(f"{path}:first", KEY)()
    assert load_user_code(f"{path}:second", KEY)() == [1]


def test_a_dataclass_in_a_file_with_postponed_annotations_loads(tmp_path):
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A: x: int = 3\n"
    assert load_user_code(f"{write(tmp_path, text)}:A", KEY)().x == 3


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1\n", "score", "defines no score; defined: x"),
        ("def scored(): ...\n", "score", "nearest: scored"),
        ("\n\nraise RuntimeError('no key')\n", "score", "mine.py:3 <module>: RuntimeError: no key; mend"),
        ("import not_there\n", "score", "ModuleNotFoundError: No module named 'not_there'"),
        ("def score(:\n", "score", "mine.py:1: SyntaxError"),
        ("import sys; del sys.modules[__name__]\nint('x')\n", "score", "mine.py:2 <module>: ValueError"),
        ("import sys; sys.exit(3)\n", "score", "mine.py:1 <module>: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, text, name, message):
    with pytest.raises(ConfigError) as caught:
        load_user_code(f"{write(tmp_path, text)}:{name}", KEY)
    assert str(caught.value).startswith(f"{KEY}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "mine.py",
        "mine.txt:score",
        "mine.py:",
        "mine.py:a b",
        "mine.py:not_there",
        "~not-a-user/x.py:f",
        f"{'x' * 300}.py:f",
    ],
)
def test_a_spec_without_file_or_name_is_refused(tmp_path, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.names is"):
        load_user_code(spec, KEY)


def test_a_relative_path_starts_at_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path, "def score(): return 4\n")
    monkeypatch.chdir(tmp_path)
    assert load_user_code("mine.py:score", KEY)() == 4


def test_a_fault_names_the_last_line_in_the_users_file(tmp_path):
    path = write(tmp_path, "import json\ndef score(text):\n    return json.loads(text)\n")
    with pytest.raises(ValueError) as caught:
        load_user_code(f"{path}:score", KEY)("{")
    assert fault_line(caught.value, path).startswith("mine.py:3 score: JSONDecodeError: ")


def test_a_spec_is_user_code_if_it_has_a_path():
    assert [is_user_code(spec) for spec in ("em", "f1", "a.py:em", "here/a.py:em")] == [
        False,
        False,
        True,
        True,
    ]


def test_the_digest_follows_the_content(tmp_path):
    before = digest(write(tmp_path, "a = 1\n"))
    assert digest(write(tmp_path, "a = 1\n")) == before != digest(write(tmp_path, "a = 2\n"))
