"""Every pair of a method's settings trains, or is refused in one line. A new setting is one line of `VALUES`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import OF_INNER_BRANCHES, OF_TREES, Aggregation
from a2tgpo.config.load import load_config
from a2tgpo.config.method_part import ADVANTAGE, NO_CREDIT, OBJECTIVE, TOKEN_CREDIT
from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.loss.credit import credit_tokens, needs_contrast
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.trajectory import Call, Trajectory, Turn

BASE = load_config(Path(__file__).parents[3] / "configs" / "quickstart.yaml", ["algorithm.clip_beta=0"])
VALUES: dict[str, tuple[Any, ...]] = {
    "algorithm.advantage": tuple(sorted(ADVANTAGE.names(), key=lambda name: name != "turn_group")),
    "algorithm.objective": tuple(sorted(OBJECTIVE.names(), key=lambda name: name != "clipped_ratio")),
    "algorithm.token_credit": (NO_CREDIT, *TOKEN_CREDIT.names()),
    "algorithm.contrast.level": ("token", "turn"),
    "algorithm.ratio": ("token", "turn", "sequence"),
    "algorithm.turn_signal": ("gain", "scores"),
    "algorithm.clip_beta": (0.0, 0.3),
    "algorithm.dual_clip": (0.0, 3.0),
    "algorithm.clip_cov_share": (0.0, 0.2),
    "algorithm.gain_spread_floor": (0.0, 0.01),
    "algorithm.normalize_by_std": (True, False),
    "algorithm.rescale": (True, False),
    "algorithm.failed_calls": ("neutral", "count"),
    "algorithm.aggregation": get_args(Aggregation),
    "algorithm.correction.kind": ("none", "truncate", "mask"),
    "algorithm.kl_coef": (0.0, 1e-3),
    "algorithm.entropy_coef": (0.0, 1e-3),
    "rollout.dynamic_sampling": (False, True),
    "rollout.router_replay": (False, True),
    "rollout.partial.tokens_per_step": (0, 1000),
    "rollout.gain.measure": ("probability", "log_probability"),
    "rollout.gain.scorer": ("policy", "reference"),
    "rollout.tree.initial": (0, 2),
    "rollout.tree.choice": ("entropy", "random"),
    "rollout.inner_branches": (0, 8),
    "update.extrapolation.horizon": (0, 5),
}
"""The tested values of each setting."""
COMPLETED = (
    "algorithm.objective",
    "algorithm.ratio",
    "algorithm.token_credit",
    "algorithm.contrast.level",
    "algorithm.correction.kind",
    "algorithm.advantage",
    "rollout.tree.initial",
    "rollout.inner_branches",
)
"""Settings that are changed to find a configuration in which a pair works."""
MOST_CHANGES = 2
REFUSED = {
    ("algorithm.ratio=token", "algorithm.objective=gmpo"),
    ("algorithm.ratio=token", "algorithm.objective=gspo_token"),
    ("algorithm.dual_clip=3.0", "algorithm.ratio=turn"),
    ("algorithm.dual_clip=3.0", "algorithm.ratio=sequence"),
    *(
        ("algorithm.dual_clip=3.0", f"algorithm.objective={o}")
        for o in ("cispo", "gmpo", "gspo_token", "sapo")
    ),
    ("algorithm.clip_beta=0.3", "algorithm.objective=sapo"),
    *(
        ("algorithm.clip_beta=0.3", f"algorithm.advantage={a}")
        for a in ("appo", "gigpo", "grpo", "gtpo", "hgpo", *OF_TREES)
    ),
    *(("algorithm.clip_cov_share=0.2", f"algorithm.token_credit={c}") for c in TOKEN_CREDIT.names()),
    ("algorithm.gain_spread_floor=0.01", "algorithm.normalize_by_std=False"),
    ("rollout.router_replay=True", "algorithm.token_credit=gcpo"),
    ("rollout.partial.tokens_per_step=1000", "algorithm.correction.kind=none"),
    ("rollout.partial.tokens_per_step=1000", "rollout.tree.initial=2"),
    *(("rollout.partial.tokens_per_step=1000", f"algorithm.advantage={a}") for a in OF_TREES),
    ("rollout.gain.scorer=reference", "algorithm.turn_signal=scores"),
    *(
        ("algorithm.gain_spread_floor=0.01", f"algorithm.advantage={a}")
        for a in ("appo", "gigpo", "grpo", "gtpo", "hgpo", "igpo_joint", "igpo_separate", *OF_TREES)
    ),
    ("algorithm.clip_beta=0.3", "rollout.tree.initial=2"),
    ("algorithm.gain_spread_floor=0.01", "rollout.tree.initial=2"),
    *(
        ("rollout.inner_branches=8", other)
        for other in (
            "algorithm.clip_beta=0.3",
            "algorithm.gain_spread_floor=0.01",
            "algorithm.objective=gmpo",
            "rollout.partial.tokens_per_step=1000",
            "rollout.tree.initial=2",
        )
    ),
    ("rollout.partial.tokens_per_step=1000", "algorithm.advantage=appo"),
    ("algorithm.objective=gmpo", "algorithm.advantage=appo"),
    ("algorithm.objective=gmpo", "algorithm.token_credit=appo"),
    *(
        (f"rollout.inner_branches={0 if a in OF_INNER_BRANCHES else 8}", f"algorithm.advantage={a}")
        for a in ADVANTAGE.names()
    ),
    *(
        (f"rollout.tree.initial={0 if a in OF_TREES else 2}", f"algorithm.advantage={a}")
        for a in ADVANTAGE.names()
    ),
}
"""The pairs that are refused whatever the other settings are. docs/methods.md says why."""


def configured(settings: dict[str, Any], base: RunConfig = BASE) -> RunConfig:
    """The configuration with `settings`, checked as at the start of a run."""
    by_section: dict[str, dict] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        by_section.setdefault(section, {})[name] = value
    sections = {name: changed(getattr(base, name), values) for name, values in by_section.items()}
    config = dataclasses.replace(base, **sections)
    config.check_training()
    return config


def changed(section: Any, values: dict[str, Any]) -> Any:
    nested = {name: value for name, value in values.items() if "." in name}
    plain = {name: value for name, value in values.items() if "." not in name}
    for name, value in nested.items():
        inner, _, field = name.partition(".")
        before = plain.get(inner, getattr(section, inner))
        plain[inner] = dataclasses.replace(before, **{field: value})
    return dataclasses.replace(section, **plain)


def completions(pair: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield settings that contain the pair, with at most `MOST_CHANGES` of `COMPLETED` not at their first values."""
    free = [key for key in COMPLETED if key not in pair]
    plain = {key: VALUES[key][0] for key in free} | pair
    for count in range(MOST_CHANGES + 1):
        for keys in itertools.combinations(free, count):
            for values in itertools.product(*(VALUES[key][1:] for key in keys)):
                yield plain | dict(zip(keys, values, strict=True))


@functools.cache
def rollouts() -> list[Trajectory]:
    """Two prompts with three rollouts each, up to three turns of up to four tokens."""
    rng = random.Random(0)

    def turn(is_final: bool) -> Turn:
        tokens = [1] * rng.randint(1, 4)
        calls = [] if is_final else [Call(tool="search", arguments="q", failed=rng.random() < 0.2)]
        worth = {"info_gain": rng.random(), "score": rng.random()} if calls else {}
        return Turn(tokens=tokens, rollout_logprobs=[-1.0] * len(tokens), calls=calls, **worth)

    return [
        Trajectory(
            prompt_index=number // 3,
            prompt_id=str(number // 3),
            sample_index=number % 3,
            prompt_tokens=[0],
            turns=[turn(t == number % 3) for t in range(number % 3 + 1)],
            stop_reason="answer",
            outcome_reward=float(number % 2),
        )
        for number in range(6)
    ]


def train(config: RunConfig) -> None:
    """Compute advantages, credit, loss and gradient as a step does; all are finite, and the gradient is not 0."""
    algorithm, trajectories = config.algorithm, rollouts()
    table = build_turn_table(
        trajectories,
        num_prompts=2,
        max_turns=3,
        failed_calls=algorithm.failed_calls,
        turn_signal=algorithm.turn_signal,
    )
    found = compute_advantages(table, algorithm, dp_group=None)
    scales = clip_scale(torch.nn.functional.pad(found.normalized_gain, (0, 1)), beta=algorithm.clip_beta)
    turns = [(i, t, len(turn.tokens)) for i, of in enumerate(trajectories) for t, turn in enumerate(of.turns)]
    counts = torch.tensor([count for _, _, count in turns])
    row = torch.tensor([i for i, _, _ in turns]).repeat_interleave(counts)
    column = torch.tensor([t for _, t, _ in turns]).repeat_interleave(counts)
    n = len(row)
    generator = torch.Generator().manual_seed(1)
    old, new, contrast, draws = (torch.randn(n, generator=generator).double() * 0.1 - 1 for _ in range(4))
    logprobs = new.requires_grad_()
    inputs = LossInputs(
        old_logprobs=old,
        advantages=found.advantages[row, column],
        clip_scale=scales[row, column],
        weights=torch.full((n,), 1 / n).double(),
        turn_ids=torch.arange(len(turns)).repeat_interleave(counts),
        sequence_ids=row,
        num_turns=len(turns),
        num_sequences=len(trajectories),
        ref_logprobs=old - 0.1 if algorithm.kl_coef else None,
        importance=(old - new.detach()).exp() if algorithm.correction.kind != "none" else None,
        is_cov_clipped=draws > -1 if algorithm.clip_cov_share else None,
        contrast_logprobs=contrast if needs_contrast(algorithm) else None,
    )
    inputs, _ = credit_tokens(logprobs, inputs, algorithm)
    result = policy_loss(logprobs, inputs, algorithm)
    result.loss.backward()
    assert result.loss.isfinite() and logprobs.grad.isfinite().all() and logprobs.grad.abs().sum() > 0


def pairs() -> list[tuple[dict[str, Any], set[str]]]:
    """All pairs of values of two settings, and their names."""
    found = []
    for one, other in itertools.combinations(VALUES, 2):
        for values in itertools.product(VALUES[one], VALUES[other]):
            pair = dict(zip((one, other), values, strict=True))
            found.append((pair, {f"{key}={value}" for key, value in pair.items()}))
    return found


def refusal_of(settings: dict[str, Any]) -> str:
    try:
        configured(settings)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_pair_of_settings_trains_or_is_refused_at_start():
    refused = [set(pair) for pair in REFUSED]
    for pair, names in pairs():
        accepted = next((s for s in completions(pair) if not refusal_of(s)), None)
        assert (accepted is None) == (names in refused), names
        if accepted is not None:
            train(configured(accepted))


def test_a_refusal_is_one_line_with_a_key_of_the_method_and_a_mend_that_helps():
    free = [key for key in COMPLETED if key not in ("algorithm.advantage", "algorithm.correction.kind")]
    for advantage, beta in itertools.product(("turn_group", "grpo", "at2po"), (0.0, 0.3)):
        for values in itertools.product(*map(VALUES.get, free)):
            settings = dict(zip(free, values, strict=True))
            settings |= {"algorithm.advantage": advantage, "algorithm.clip_beta": beta}
            message = refusal_of(settings)
            if not message:
                continue
            assert re.match(
                r"(algorithm\.\w+|rollout\.(tree\.initial|inner_branches)) is .*; allowed: ", message
            )
            assert "\n" not in message
            mends = re.findall(r"((?:algorithm|rollout)\.[\w.]+)=([\w.]+)", message.rpartition("; ")[2])
            assert mends, message
            for key, value in mends:
                kind = type(VALUES[key][0])
                mended = refusal_of({**settings, key: kind(value)})
                assert mended.partition(" is ")[0] != message.partition(" is ")[0] or mended == "", (
                    settings,
                    message,
                    mended,
                )


def test_every_part_that_is_a_file_is_walked_through():
    walked = {key: set(values) - {NO_CREDIT} for key, values in VALUES.items()}
    for part in (ADVANTAGE, OBJECTIVE, TOKEN_CREDIT):
        assert walked[part.key] == set(part.names())
