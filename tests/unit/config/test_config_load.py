import dataclasses
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.load import dump_config, flat_config, load_config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.renamed import RENAMED
from a2tgpo.config.rollout import GainConfig, RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.io.errors import ConfigError

MINIMAL = """
run: {name: trial}
model: {path: models/tiny}
data: {train: train.jsonl, test: test.jsonl}
search: {corpus: corpus.jsonl}
"""


def write(folder, text, name="run.yaml"):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_sets_values_and_the_rest_is_default(tmp_path):
    config = load_config(
        write(tmp_path, MINIMAL + "rollout: {group_size: 4, gain: {measure: log_probability}}\nupdate:")
    )
    assert config.run.name == "trial"
    assert (config.rollout.group_size, config.rollout.prompts_per_step) == (4, 64)
    assert (config.rollout.gain.measure, config.rollout.gain.answer_reduction) == ("log_probability", "first")
    assert config.update.lr == 1e-6


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-4", 1e-4), ("3", 3.0), ("0.5", 0.5), (".5e0", 0.5), ("'2e-5'", 2e-5)],
)
def test_numbers_are_floats_however_they_are_written(tmp_path, text, value):
    from_file = load_config(write(tmp_path, MINIMAL + f"update: {{lr: {text}}}")).update.lr
    overridden = load_config(write(tmp_path, MINIMAL), [f"update.lr={text}"]).update.lr
    assert from_file == overridden == value
    assert type(from_file) is type(overridden) is float


@pytest.mark.parametrize("place", ["file", "command line"])
def test_numbers_in_mappings_are_floats_however_they_are_written(tmp_path, place):
    train, scores = "{a.jsonl: 1e-3, b.jsonl: 2}", "{right: '2e-5', wrong: -1e-3}"
    minimal = MINIMAL.replace("train: train.jsonl", f"train: {train}")
    settings = ["data.test=t", f"judge.scores={scores}"]
    config = load_config(write(tmp_path, minimal), settings)
    if place == "command line":
        config = load_config(write(tmp_path, MINIMAL), [*settings, f"data.train={train}"])
    assert config.data.train_files == {"a.jsonl": 1e-3, "b.jsonl": 2}
    assert config.judge.scores == {"right": 2e-5, "wrong": -1e-3}
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "data.train={a: much}",
            "data.train is {'a': 'much'}; allowed: a file, or a mapping of each file to a",
        ),
        (
            "data.train={a: 1e999}",
            "data.train is {'a': inf}; allowed: a file, or a mapping of each file to a",
        ),
        ("data.train=[a, b]", "data.train is ['a', 'b']; allowed: a text, or a mapping of names to numbers"),
        ("judge.scores=[a, b]", "judge.scores is ['a', 'b']; allowed: a mapping of names to numbers"),
        (
            "judge.scores={a: b}",
            "judge.scores is {'a': 'b'}; allowed: texts in lower case, each with a finite",
        ),
        (
            "judge.scores={yes: 1}",
            "judge.scores is {True: 1}; allowed: names that are texts; put them in quotes",
        ),
        ("run.steps=3.0", "run.steps is 3.0; allowed: an integer"),
        ("run.steps=1e3", "run.steps is '1e3'; allowed: an integer"),
        ("run.steps=true", "run.steps is True; allowed: an integer"),
        ("run.steps=", "run.steps is None; allowed: an integer"),
        ("run.steps=[1", "run.steps is '[1'; allowed: an integer"),
        ("update.lr=fast", "update.lr is 'fast'; allowed: a finite number"),
        ("update.lr=.inf", "update.lr is inf; allowed: a finite number"),
        ("update.lr=.nan", "update.lr is nan; allowed: a finite number"),
        ("update.lr=on", "update.lr is True; allowed: a finite number"),
        ("update.lr=" + "9" * 400, "update.lr is '999"),
        ("parallel.sequence=1", "parallel.sequence is 1; allowed: true or false"),
        ("run.steps=0", "run.steps is 0; allowed: >= 1"),
        (
            "rollout.gain.measure=odds",
            "rollout.gain.measure is 'odds'; allowed: probability | log_probability",
        ),
        ("run.steps", "'run.steps' has no value; write section.field=value"),
        ("rollout=3", "rollout is '3'; allowed: a section, with keys like rollout.prompts_per_step"),
        ("rollout.group_sise=3", "unknown key rollout.group_sise; nearest valid key: rollout.group_size"),
        ("group_size=3", "unknown key group_size; nearest valid key: rollout.group_size"),
        ("rollout.measure=x", "unknown key rollout.measure; nearest valid key: rollout.gain.measure"),
        ("=3", "unknown key ; nearest valid key"),
        ("data.chat_template_kwargs=off", "data.chat_template_kwargs is False; allowed: a mapping of names"),
        ("data.chat_template_kwargs=[a]", "data.chat_template_kwargs is ['a']; allowed: a mapping of names"),
        ("data.chat_template_kwargs={a: [1]}", "data.chat_template_kwargs is {'a': [1]}; allowed: names of"),
        ("data.chat_template_kwargs={a b: 1}", "data.chat_template_kwargs is {'a b': 1}; allowed: names of"),
        ("data.chat_template_kwargs={a: .inf}", "data.chat_template_kwargs is {'a': inf}; allowed: names of"),
        ('data.chat_template_kwargs={a: "\\ud800"}', "allowed: a text in UTF-8 without NUL"),
        (
            "data.chat_template_kwargs.a=1",
            "unknown key data.chat_template_kwargs.a; nearest valid key: data.",
        ),
    ],
)
def test_bad_override_is_one_line_naming_key_value_and_rule(tmp_path, override, says):
    message = refusal(write(tmp_path, MINIMAL), override)
    assert message.startswith("command line: ")
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "rollout: {group_sizes: 3}",
            "unknown key rollout.group_sizes; nearest valid key: rollout.group_size",
        ),
        ("rolout: {group_size: 3}", "unknown key rolout; nearest valid key: rollout"),
        ("3: 4", "unknown key 3; nearest valid key"),
        ("rollout: 3", "rollout is 3; allowed: a section, with keys like rollout.prompts_per_step"),
        ("rollout: {gain: [1]}", "rollout.gain is [1]; allowed: a section"),
        ("rollout: {group_size: '4'}", "rollout.group_size is '4'; allowed: an integer"),
        ("parallel: {sequence: 'no'}", "parallel.sequence is 'no'; allowed: true or false"),
        ("algorithm: {ratio: no}", "algorithm.ratio is False; allowed: turn | sequence | token"),
        ("algorithm: {ratio: [turn]}", "algorithm.ratio is ['turn']; allowed: turn | sequence | token"),
        (
            "algorithm: {ratio: sequences}",
            "algorithm.ratio is 'sequences'; allowed: turn | sequence | token (nearest: sequence)",
        ),
        ("warmstart: {source: no}", "warmstart.source is False; allowed: a text (put it in quotes)"),
        ("tools: {names: search}", "tools.names is 'search'; allowed: a list of texts; write [search]"),
        ("profile: {steps: 3}", "profile.steps is 3; allowed: a list of integers; write [3]"),
        ("profile: {steps: [3, x]}", "profile.steps is [3, 'x']; allowed: a list of integers"),
        ("profile: {steps: [true]}", "profile.steps is [True]; allowed: a list of integers"),
        ("profile: {steps: [0]}", "profile.steps is [0]; allowed: steps >= 1"),
        (
            "profile: {steps: [241]}",
            "profile.steps is [241]; allowed: steps of the run, 1 to run.steps (240)",
        ),
        ("profile: {memory: [update]}", "profile.memory is ['update']; allowed: [] without profile.steps"),
        (
            "profile: {steps: [1], memory: [train]}",
            "profile.memory is ['train']; allowed: among bank, refit, rollout, score, update",
        ),
        ("run.steps: 3", "unknown key 'run.steps'; nearest valid key: run.steps"),
        ("algorithm: {gamma: 1.5}", "algorithm.gamma is 1.5; allowed: in [0, 1]"),
        ("rollout: {group_size: 0}", "rollout.group_size is 0; allowed: >= 1"),
        ("update: {prompts_per_minibatch: 7}", "update.prompts_per_minibatch is 7; allowed: a divisor of"),
        ("update: {lr: 1, lr: 2}", "line 6, column 17: not valid YAML (key 'lr' occurs twice)"),
        ("update: {lr: 1", "not valid YAML"),
        ("\tupdate: 1", "line 6, column 1: not valid YAML"),
        ("update: {lr: 2024-13-45}", "not valid YAML"),
        ("update: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (
            "update: {lr: [&a [1], &b [*a, *a]]}",
            "line 6, column 27: not valid YAML (*a is an alias of a list",
        ),
        ("update: &a {lr: 1}\nrollout: {<<: *a}", "not valid YAML (*a is an alias of a list or mapping"),
        ("rollout: {group_size: 0x" + "f" * 9000 + "}", "not valid YAML (integer past 2^1024)"),
        ("update: {lr: 1" + ":59" * 300 + ".5}", "is a number in base 60 in YAML"),
        (
            "rollout: {max_turns: 012}",
            "line 6, column 22: not valid YAML (012 is a number in base 8 in YAML; write it in",
        ),
        (
            "algorithm: {ratio: 007}",
            "(007 is a number in base 8 in YAML; write it in base 10, or in quotes if it is a text)",
        ),
        ("rollout: {max_turns: 1:30}", "(1:30 is a number in base 60 in YAML; write it in base 10"),
        ("update: {lr: 1:30.5}", "(1:30.5 is a number in base 60 in YAML"),
        ("rollout: {max_turns: 1e3}", "rollout.max_turns is '1e3'; allowed: an integer"),
        ("warmstart: {source: on}", "warmstart.source is True; allowed: a text (put it in quotes)"),
        ("warmstart: {source: 2026-11-28}", "allowed: a text (put it in quotes)"),
        (
            "warmstart: {source: ~}",
            "warmstart.source is None; allowed: a text (YAML reads a lone ~ and an empty value as null)",
        ),
        ("update: {? [lr] : 1}", "not valid YAML (found unhashable key)"),
    ],
)
def test_bad_file_is_one_line_naming_the_file(tmp_path, text, says):
    path = write(tmp_path, MINIMAL + text)
    message = refusal(path)
    assert message.startswith(path)
    assert says in message


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path, key):
    path, renamed = write(tmp_path, MINIMAL), f"{key} was renamed: {RENAMED[key]}"
    assert refusal(path, f"{key}=1") == f"command line: {renamed}"
    section, name = key.split(".")
    assert refusal(path, write(tmp_path, f"{section}: {{{name}: 1}}", "old.yaml")).endswith(
        f"old.yaml: {renamed}"
    )


def test_all_renamed_keys_of_a_file_are_named_at_once(tmp_path):
    path = write(tmp_path, MINIMAL.replace("search: {", "search: {timeout_s: 3, num_workers: 4, "))
    assert refusal(path) == (
        f"{path}: search.timeout_s was renamed: search.request_timeout_s; "
        "search.num_workers was renamed: tools.max_concurrent_calls"
    )


def test_the_new_name_of_a_renamed_key_is_a_key_and_the_old_one_is_none():
    keys = flat_config(load_config("configs/quickstart.yaml")).keys()
    assert set(RENAMED.values()) <= keys and not RENAMED.keys() & keys


def test_a_list_is_a_list_in_a_file_and_on_the_command_line(tmp_path):
    path = write(tmp_path, MINIMAL + "tools: {names: [calculator]}")
    assert load_config(path).tools.names == ("calculator",)
    config = load_config(path, ["tools.names=[search,calculator]", "profile.steps=[3, 4]"])
    assert config.tools.names == ("search", "calculator") and config.profile.steps == (3, 4)
    assert flat_config(config)["profile.steps"] == "3,4"
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config
    assert flat_config(config)["tools.names"] == "search,calculator"


def test_a_search_has_time_for_all_its_attempts(tmp_path):
    path = write(
        tmp_path, MINIMAL.replace("search: {corpus: corpus.jsonl", "search: {backend: http, url: http://a/b")
    )
    assert load_config(path).search.longest_call_s == load_config(path).tools.call_timeout_s
    assert "tools.call_timeout_s is 240.0; allowed: >= 2 x search.request_timeout_s x (search.max" in refusal(
        path, "search.request_timeout_s=31"
    )


def test_one_value_may_have_an_alias(tmp_path):
    path = write(tmp_path, MINIMAL + "rollout: {max_turns: &n 3, group_size: *n}")
    assert load_config(path).rollout.group_size == 3


def test_broken_files_are_one_line(tmp_path):
    assert "list found; a configuration is a mapping" in refusal(write(tmp_path, "- a"))
    assert (
        f"{tmp_path}/run.yaml line 2: not UTF-8 (byte 9 of the line is 0xe9); save the file as UTF-8"
        in refusal(write(tmp_path, "run:\n  name: été".encode("latin-1")))
    )
    assert "not UTF-8 but UTF-16" in refusal(write(tmp_path, MINIMAL.encode("utf-16")))
    assert "not valid YAML" in refusal(write(tmp_path, "[" * 3000))
    assert refusal(str(tmp_path / "nowhere.yaml")).startswith("no configuration file")
    assert refusal(str(tmp_path)).startswith("no configuration file")


def test_missing_required_keys_are_all_named(tmp_path):
    message = refusal(write(tmp_path, ""))
    assert "required and not set: data.train, model.path, run.name; set it there or as" in message
    path = write(tmp_path, "run: {name: a}\nmodel: {path: b}\ndata: {test: c}\nsearch: {corpus: d}")
    assert f"{path}: required and not set: data.train;" in refusal(path)
    assert load_config(path, ["data.train=t"]).data.train == "t"


def test_rule_names_who_set_the_value_last(tmp_path):
    write(tmp_path, MINIMAL + "algorithm: {gamma: 7}", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nrollout: {temperature: 0.5}")
    assert refusal(path).startswith(f"{tmp_path}/base.yaml: algorithm.gamma is 7.0")
    assert refusal(path, "algorithm.gamma=9").startswith("command line: algorithm.gamma is 9.0")
    assert load_config(path, ["algorithm.gamma=0.5"]).algorithm.gamma == 0.5


def test_bases_are_relative_to_the_file_and_nearer_ones_win(tmp_path):
    low = "checkpoint: {keep: 9}\nrollout: {group_size: 2, max_turns: 2}"
    write(tmp_path, MINIMAL + low, "low.yaml")
    write(tmp_path, "base: ../low.yaml\nrollout: {group_size: 3, temperature: 0.5}", "sub/middle.yaml")
    path = write(tmp_path, "base: sub/middle.yaml\nrollout: {temperature: 0.7}")
    config = load_config(path, ["rollout.max_turns=5", "rollout.max_turns=6"])
    rollout = config.rollout
    assert (rollout.group_size, rollout.temperature, rollout.max_turns, config.checkpoint.keep) == (
        3,
        0.7,
        6,
        9,
    )
    assert config.data.train == "train.jsonl"


def test_base_that_is_missing_circular_or_no_path_is_refused(tmp_path):
    path = write(tmp_path, "base: gone.yaml")
    assert refusal(path).startswith(f"{path}: base: no configuration file {tmp_path}/gone.yaml")
    write(tmp_path, "base: sub/b.yaml", "a.yaml")
    write(tmp_path, "base: ../a.yaml", "sub/b.yaml")
    assert "forms a cycle: " in refusal(str(tmp_path / "a.yaml"))
    assert "base is ['x']; allowed: the path of one YAML file" in refusal(write(tmp_path, "base: [x]"))


def test_texts_on_the_command_line_stand_as_they_are(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["run.name=007", "data.instructions=", "rollout.gain.scaffold=a: [b=c"])
    assert (config.run.name, config.data.instructions) == ("007", "")
    assert config.rollout.gain.scaffold == "a: [b=c"


def test_a_mapping_is_taken_whole_from_the_file_and_the_command_line(tmp_path):
    path = write(tmp_path, MINIMAL.replace("data: {", "data: {chat_template_kwargs: {a: 1, b: x}, "))
    assert load_config(path).data.chat_template_kwargs == {"a": 1, "b": "x"}
    config = load_config(path, ["data.chat_template_kwargs={enable_thinking: false}"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config
    assert flat_config(config)["data.chat_template_kwargs"] == '{"enable_thinking": false}'


def leaves(section, prefix=""):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_dump_writes_every_key_out(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    dumped = yaml.safe_load(dump_config(config))
    for key in leaves(config):
        node, expected = dumped, config
        for part in key.split("."):
            node, expected = node[part], getattr(expected, part)
        assert node == (list(expected) if isinstance(expected, tuple) else expected), key


def test_numbers_with_underscores_or_in_a_base_that_they_name_are_what_they_say(tmp_path):
    path = write(tmp_path, "run: {steps: 1_000, seed: 0x10}\nrollout: {max_turns: 0b11, temperature: 0_1.5}")
    config = load_config(write(tmp_path, f"base: {path}" + MINIMAL, "b.yaml"))
    assert (config.run.steps, config.run.seed, config.rollout.max_turns) == (1000, 16, 3)
    assert config.rollout.temperature == 1.5


def test_home_and_variables_in_paths_are_replaced_wherever_they_are_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    write(tmp_path, "data: {train: ~/q.jsonl, test: '${SCRATCH}/q.jsonl'}", "sets.yaml")
    monkeypatch.setenv("SETS", str(tmp_path))
    path = write(
        tmp_path, MINIMAL.replace("data: {train: train.jsonl, test: test.jsonl}", "base: $SETS/sets.yaml")
    )
    config = load_config(
        "$SETS/run.yaml",
        # A variable in an overridden value need not be set.
        ["run.root=~/runs", "model.path=$SCRATCH/m", "run.name=a-${NOT_SET}", "run.name=b$$c"],
    )
    assert (config.data.train, config.data.test) == ("/home/me/q.jsonl", "/scratch/me/q.jsonl")
    assert (config.run.root, config.model.path, config.run.name) == ("/home/me/runs", "/scratch/me/m", "b$c")
    assert config.data.instructions == load_config(path).data.instructions
    assert load_config(write(tmp_path, dump_config(config), "again.yaml")) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "run.root=${NOT_SET}/runs",
            "run.root is '${NOT_SET}/runs', but $NOT_SET is not set or empty; export NOT_SET=",
        ),
        ("data.train=$EMPTY/q", "data.train is '$EMPTY/q', but $EMPTY is not set or empty"),
        ("model.path=${oc.env:HOME}/m", "allowed in ${...}: the name of an environment variable"),
        ("model.path=${HOME:-/x}/m", "allowed in ${...}: the name of an environment variable"),
        ("model.path=${HOME", "allowed in ${...}: the name of an environment variable"),
        ("search.corpus=~nobody-here/c", "but ~nobody-here is not a user with a home folder"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_one_line(tmp_path, monkeypatch, override, says):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    message = refusal(write(tmp_path, MINIMAL), override)
    assert message.startswith(f"command line: {override.partition('=')[0]} is ") and says in message


@pytest.mark.parametrize(("letter", "fits"), [("x", 200), ("模", 66), ("😀", 50)])
def test_the_length_of_a_runs_name_is_counted_in_bytes(tmp_path, letter, fits):
    path = write(tmp_path, MINIMAL)
    assert load_config(path, [f"run.name={letter * fits}"]).run.name == letter * fits
    (tmp_path / f"{letter * fits}.previous_1000-warmstart").mkdir()  # the file system allows this name
    assert "at most 200 bytes in UTF-8" in refusal(path, f"run.name={letter * (fits + 1)}")


positive = st.floats(min_value=1e-300, max_value=1e300)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@settings(max_examples=60, deadline=None)
@given(
    texts=st.tuples(
        st.text(letters.filter(str.isprintable), min_size=1, max_size=200).filter(
            # An expanded path does not begin with ~.
            lambda text: (
                "/" not in text and text not in (".", "..") and text[0] != "~" and len(text.encode()) <= 200
            )
        ),
        *[st.text(letters, min_size=1).filter(lambda text: text[0] != "~")] * 2,
    ),
    free=st.tuples(st.text(letters), st.text(letters, min_size=1)),
    numbers=st.tuples(positive, positive, st.floats(0, 1), st.integers(1, 10**20), st.booleans()),
)
def test_dumped_configuration_loads_equal(texts, free, numbers):
    name, train, path = texts
    instructions, scaffold = free
    lr, eps, gamma, steps, rescale = numbers
    config = RunConfig(
        run=RunSettings(name=name, steps=steps),
        model=ModelConfig(path=path),
        data=DataConfig(train=train, test=train, instructions=instructions),
        search=SearchConfig(corpus=path),
        rollout=RolloutConfig(gain=GainConfig(scaffold=scaffold)),
        algorithm=AlgorithmConfig(gamma=gamma, rescale=rescale),
        update=UpdateConfig(lr=lr, adam_eps=eps),
    )
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(write(folder, dump_config(config))) == config


def test_a_configuration_has_one_value_a_key():
    flat = flat_config(load_config("configs/quickstart.yaml"))
    assert flat["rollout.gain.measure"] == "probability" and flat["run.steps"] == 32
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
