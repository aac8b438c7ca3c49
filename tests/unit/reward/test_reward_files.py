"""Rewards by name and by path: which can be loaded, and how mistakes are reported."""

import dataclasses
from pathlib import Path

import pytest
from scored import prompt_of, tag_reader

from a2tgpo.config.load import load_config
from a2tgpo.config.reward import RewardConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.reward.episode import Episode
from a2tgpo.reward.load import build_rewards, need_answers
from a2tgpo.reward.total import judge
from a2tgpo.trajectory import Call, Trajectory, Turn

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
CALL = Call(tool="search", arguments="q")
RIGHT = "<think> so </think> <answer> \\boxed{Paris} </answer>"


def config_of(*names: str, **settings: object) -> RunConfig:
    overrides = [f"reward.names=[{', '.join(names)}]", *(f"reward.{k}={v}" for k, v in settings.items())]
    return load_config(QUICKSTART, overrides)


def episode_of(*texts: str, answers: tuple[str, ...] = ("Paris",), **fields) -> Episode:
    """Return an episode with the turns `texts`. All but the last call the search tool and have an observation of two
    tokens.
    """
    turns = [
        Turn(tokens=[1], rollout_logprobs=[0.0], observation_tokens=[2, 3], calls=[CALL]) for _ in texts[:-1]
    ]
    trajectory = Trajectory(
        prompt_index=0,
        prompt_id="0",
        sample_index=0,
        prompt_tokens=[1],
        turns=[*turns, Turn(tokens=[1], rollout_logprobs=[0.0])],
        stop_reason="answer",
    )
    return tag_reader().read(trajectory, prompt_of(answers, **fields), texts)


def test_a_function_of_a_file_reads_the_whole_episode(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "def steps(episode):\n"
        "    (first, last) = episode.turns\n"
        "    assert first.observation == \"TokenIds('i', [2, 3])\" and last.observation == \"TokenIds('i')\"\n"
        "    assert first.calls[0].tool == 'search' and not last.calls\n"
        "    return len(episode.turns) + episode.record['steps']\n"
    )
    (named,) = build_rewards(config_of(f"{file}:steps"))
    episode = episode_of("<think> a </think> <search> q </search>", RIGHT, record='{"steps": 5}')
    assert (named.label, named.reward.score(episode)) == ("steps", 7)


def test_a_class_of_a_file_is_built_with_the_configuration(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "class Steps:\n"
        "    needs_answers = True\n"
        "    def __init__(self, config):\n"
        "        self.most = config.rollout.max_turns\n"
        "    def score(self, episode):\n"
        "        return self.most\n"
    )
    config = config_of(f"{file}:Steps", "format")
    rewards = build_rewards(config)
    assert rewards[0].reward.score(episode_of(RIGHT)) == config.rollout.max_turns
    scores = dataclasses.replace(config.algorithm, turn_signal="scores")
    config = dataclasses.replace(config, algorithm=scores)
    assert need_answers(config, rewards) and not need_answers(config, rewards[1:])


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "f", r"there is no file .*my\.py"),
        ("def f(episode)\n", "f", r"cannot load .*my\.py: my\.py:1: SyntaxError: expected ':'"),
        ("import nothing_like_it\n", "f", r"my\.py:1 <module>: ModuleNotFoundError: No module"),
        ("def score(episode): return 0\n", "scored", r"defines no scored; .*nearest: score"),
        ("f = 3\n", "f", r"it is int, which cannot be called"),
        ("def f(): return 0\n", "f", r"it does not take one argument \(too many positional arguments\)"),
        ("def f(episode, more): return 0\n", "f", r"it does not take one argument \(missing .*'more'\)"),
        ("async def f(episode): return 0\n", "f", r"it is a coroutine or a generator"),
        ("class f:\n    pass\n", "f", r"cannot be built with .*TypeError: f\(\) takes no arguments"),
        ("class f:\n    def __init__(self, c): pass\n", "f", r"a method score\(episode\), but it is missing"),
        ("raise SystemExit(3)\n", "f", r"cannot load .*my\.py: my\.py:1 <module>: SystemExit: 3; mend"),
        ("class f:\n    def __init__(self, c): exit(3)\n", "f", r"my\.py:2 __init__: SystemExit: 3"),
        (
            "class f:\n    def __init__(self, c): pass\n    needs_answers = property(lambda self: self.no)\n"
            "    def __getattr__(self, name): raise OSError(name)\n",
            "f",
            r"my\.py:4 __getattr__: OSError: no",
        ),
        (
            "class f:\n    def __init__(self, c): 1 / 0\n",
            "f",
            r"my\.py:2 __init__: ZeroDivisionError: division",
        ),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_one_line_with_the_cause(tmp_path, content, name, message):
    file = tmp_path / "my.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        build_rewards(config_of(f"{file}:{name}"))
    assert "\n" not in str(error.value) and str(error.value).startswith("reward.names")


@pytest.mark.parametrize(
    "score",
    ["em", "f1", "pass_at_2", "mean_at_4", "pass_at_1_format_gated", "em_2_hops", "standard_error_em"],
)
def test_a_function_with_the_name_of_a_score_of_evaluations_is_refused(score):
    with pytest.raises(ConfigError, match=rf"a function with another name than {score}$") as error:
        RewardConfig(names=(f"my.py:{score}",))
    assert "\n" not in str(error.value)
    assert RewardConfig(names=("em", "f1", f"my.py:my_{score}")).labels[2] == f"my_{score}"


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["em", "formats"], {}, r"reward.names .*em \| f1 \| format .*nearest: format"),
        (["em", "em"], {}, r"each with a name of its own"),
        (["em", "my.py:em"], {}, r"each with a name of its own"),
        (["my.py:tool_calls"], {}, r"a function with another name than tool_calls"),
        (["em", "f1"], {"weights": "[1]"}, r"reward.weights is \[1.0\]; allowed: \[\], or one finite number"),
        (["em"], {"weights": "[.inf]"}, r"reward.weights is \[inf\]; allowed: a list of finite numbers"),
        (["em"], {"timeout_s": 0}, r"reward.timeout_s is 0.0; allowed: > 0"),
        (["em"], {"max_failed_share": 1.5}, r"reward.max_failed_share is 1.5; allowed: in \[0, 1\]"),
    ],
)
def test_impossible_reward_settings_are_refused(names, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*names, **settings)


def test_weights_multiply_the_rewards_and_are_not_normalised():
    rewards = build_rewards(config_of("em", "f1", "format", weights="[2, 0.5, -1]"))
    verdict = judge(rewards, episode_of(RIGHT.replace("Paris", "Paris city")), format_gate=True)
    assert verdict.rewards == {"em": 0.0, "f1": pytest.approx(2 / 3), "format": 1.0}
    assert verdict.total == pytest.approx(0.5 * 2 / 3 - 1)


def test_the_gate_replaces_the_sum_but_not_the_rewards():
    broken = episode_of("<answer> \\boxed{Paris} </answer>")
    rewards = build_rewards(config_of("em", "format"))
    assert judge(rewards, broken, format_gate=True).total == -1.0
    open_gate = judge(rewards, broken, format_gate=False)
    assert (open_gate.total, open_gate.rewards) == (1.0, {"em": 1.0, "format": 0.0})


def test_a_response_without_an_answer_earns_nothing():
    rewards = build_rewards(config_of("em", "f1", "math", "format"))
    verdict = judge(rewards, episode_of("Paris"), format_gate=False)
    assert verdict.total == 0.0
