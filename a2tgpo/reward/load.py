"""Build the rewards that `reward.names` lists: modules of this package, and the user's functions and classes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.config.reward import REWARDS_PACKAGE, reward_label
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.user_code import fault_line, is_user_code, load_user_code, user_file
from a2tgpo.reward.episode import Episode, Reward, Score

KEY = "reward.names"


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward of the run, with its name and its weight."""

    label: str
    """Name of the reward in metrics and records."""
    weight: float
    reward: Reward
    path: Path
    """The file of the reward, for messages."""

    @property
    def needs_answers(self) -> bool:
        """Whether the reward reads gold answers."""
        return getattr(self.reward, "needs_answers", False)


def build_rewards(config: RunConfig) -> tuple[NamedReward, ...]:
    """Build the rewards of a run.

    Raises:
        ConfigError: with a one-line message, if a reward cannot be loaded, has the wrong signature, or cannot work
            with this configuration.
    """
    names = config.reward.names
    weights = config.reward.weights or (1.0,) * len(names)
    rewards = []
    for spec, weight in zip(names, weights, strict=True):
        reward, path = _of_user(spec, config) if is_user_code(spec) else _of_package(spec, config)
        rewards.append(NamedReward(label=reward_label(spec), weight=weight, reward=reward, path=path))
    return tuple(rewards)


def need_answers(config: RunConfig, rewards: Sequence[NamedReward]) -> bool:
    """Return whether every question must have a gold answer, for the information gain or for a reward."""
    return config.algorithm.uses_gain or any(named.needs_answers for named in rewards)


def _of_package(name: str, config: RunConfig) -> tuple[Reward, Path]:
    module = importlib.import_module(f"{REWARDS_PACKAGE}.{name}")
    return module.build(config), Path(module.__file__ or "")


class _Function:
    """A reward that calls a user's function."""

    def __init__(self, function: Callable[[Episode], float | Score]):
        self.score = function
        self.needs_answers = getattr(function, "needs_answers", False)


def _of_user(spec: str, config: RunConfig) -> tuple[Reward, Path]:
    path, name = user_file(spec, KEY)
    found = load_user_code(spec, KEY)
    if not inspect.isclass(found):
        _require_takes_episode(found, spec, f"{name}(episode)")
        return _Function(found), path
    try:
        build: Any = found
        reward: Any = build(config)
        bool(getattr(reward, "needs_answers", False))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{KEY}: {spec} cannot be built with the configuration: {fault_line(error, path)}"
        ) from None
    _require_takes_episode(getattr(reward, "score", None), spec, "a method score(episode)")
    return reward, path


def _require_takes_episode(function: Any, spec: str, wanted: str) -> None:
    """Raise `ConfigError` unless `function` can be called with one argument and is not asynchronous."""
    problem = ""
    if not callable(function):
        problem = (
            "is missing" if function is None else f"is {type(function).__name__}, which cannot be called"
        )
    elif inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        problem = "is a coroutine or a generator"
    else:
        try:
            inspect.signature(function).bind(object())
        except TypeError as error:
            problem = f"does not take one argument ({error})"
        except ValueError:  # a function without a readable signature
            pass
    if problem:
        raise ConfigError(f"{KEY} is {spec!r}; allowed: {wanted}, but it {problem} (docs/rewards.md)")
