"""Resume a run, perhaps with a changed configuration. Some changes are refused, and all others are reported."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.origin import require_same_model
from a2tgpo.collect.carried_pool import Held
from a2tgpo.config.renamed import with_new_names
from a2tgpo.config.run import RunConfig
from a2tgpo.config.user_files import PREFIX, file_digests
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet
from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.rollout.carried_group import CarriedGroup, shortened
from a2tgpo.rollout.multi_turn import Limits
from a2tgpo.run.rules import Changes, changes

logger = logging.getLogger(__name__)

_SCORED_BY = (
    *(
        "rollout.gain.scorer",
        "rollout.gain.measure",
        "rollout.gain.answer_reduction",
        "rollout.gain.max_aliases",
        "rollout.gain.scaffold",
    ),
    *("reward.names", "reward.weights", "reward.format_gate", "reward.overlong_", "algorithm.turn_signal"),
    *(f"{PREFIX}reward.names", f"{PREFIX}judge.prompt_file"),
    *("judge.model", "judge.pattern", "judge.scores", "judge.prompt_file", "judge.max_tokens"),
)
"""Prefixes of the settings on which the rewards and gains of finished trajectories depend."""


def check_resume(resume: str) -> None:
    """Raise `ConfigError` if `resume` is a path without a complete checkpoint."""
    if resume not in ("auto", "none") and not (Path(resume) / checkpoint.MARKER).is_file():
        raise ConfigError(
            f"--resume is {resume!r}; allowed: auto, none, or a checkpoint's folder with {checkpoint.MARKER}"
        )


def find_record(config: RunConfig, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint from which a start would resume, and its record; None if there is none.

    With `auto`, this is the newest checkpoint whose `state.json` can be read. No other file is read.

    Raises:
        ConfigError: with a one-line message, if `resume` is a path whose record cannot be read.
    """
    paths = [] if resume == "none" else [Path(resume)]
    if resume == "auto":
        root = Path(config.run.root) / config.run.name / "checkpoints"
        paths = [root / f"step_{step}" for step in checkpoint.steps_in(root)]
    for path in paths:
        if not (path / checkpoint.MARKER).is_file() or (
            resume == "auto" and checkpoint.has_weights_only(path)
        ):
            continue
        try:
            return path, checkpoint.read_record(path)
        except (OSError, ValueError) as error:
            if resume != "auto":
                raise ConfigError(f"--resume: {first_line(error)}") from error
            # The start will skip this checkpoint and log a warning.
    return None


def trained_so_far(folder: Path) -> str:
    """Return a few words about the run's progress, or an empty string if nothing was trained yet."""
    root = folder / "checkpoints"
    for step in checkpoint.steps_in(root):
        if (root / f"step_{step}" / checkpoint.MARKER).is_file():
            return f"at step {step}"
    return "without a checkpoint yet" if any((folder / "rollouts").glob("step_*")) else ""


def require_same_run(
    path: Path, record: dict[str, Any], hf_config: PretrainedConfig, sampler: PromptSampler
) -> None:
    """Raise a `ConfigError` of one line if the checkpoint with this `record` has another model or other questions.

    Args:
        hf_config: the architecture of the present model.
        sampler: the sampler of the present training questions.
    """
    try:
        require_same_model(path, record, hf_config)
    except ValueError as error:
        raise ConfigError(f"--resume: {error}") from error
    # The checkpoint of a converted model has no sampler state.
    if "sampler" in record["state"]:
        sampler.require_same_questions(record["state"]["sampler"])


def changed_settings(state: dict[str, Any], settings: Mapping[str, Any]) -> Changes:
    """Return the settings that differ between the checkpoint's `state` and `settings` (`settings_of`)."""
    return changes(with_new_names(state.get("settings", {})), settings)


def changed_files(path: Path, config: RunConfig) -> list[str]:
    """Return a line for each of the user's files that has changed since the run that wrote the checkpoint `path`.

    If a reward or a tool has changed, the same weights may get different scores.
    """
    try:
        state = checkpoint.read_record(path)["state"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--checkpoint: {first_line(error)}") from error
    changed = changed_settings(state, file_digests(config))
    return [
        f"{name.removeprefix(PREFIX)} has changed since {path.name} was written; this program uses the present file, "
        f"and the run's folder plugins/ has the earlier one (digest {before})"
        for name, (before, _) in changed.items()
    ]


def follow_settings(
    held: Sequence[Held],
    *,
    config: RunConfig,
    prompts: PromptSet,
    changed: Collection[str],
) -> tuple[list[Held], dict[str, int]]:
    """Select the carried groups that can continue with the present settings. The result is equal on all ranks.

    A trajectory with more tokens or turns than the settings now allow is shortened and continues.

    Args:
        held: the carried groups of all engines.
        prompts: the training questions.
        changed: the keys of the settings that have changed (`changed_settings`).

    Returns:
        The groups that continue, and a map from each reason to the number of groups dropped for this reason.
    """
    limits = Limits(
        max_turns=config.rollout.max_turns,
        max_turn_tokens=config.rollout.max_turn_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        max_model_len=config.max_model_len,
    )
    scored_anew = sorted(key for key in changed if key.startswith(_SCORED_BY))
    kept: list[Held] = []
    dropped: dict[str, int] = {}
    for item in held:
        reason = _misfit(item.group, config, prompts, scored_anew)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(Held(engine=item.engine, group=shortened(item.group, limits)))
    return kept, dropped


def _misfit(group: CarriedGroup, config: RunConfig, prompts: PromptSet, scored_anew: Sequence[str]) -> str:
    """Return a few words that tell why `group` cannot continue, or an empty string if it can."""
    size = len(group.trajectories)
    if size and size != config.rollout.group_size:
        return f"started with rollout.group_size {size}, which is now {config.rollout.group_size}"
    (prompt,) = prompts.prompts([group.question])
    if prompt.tokens != group.prompt.tokens:
        return "whose prompt has changed (data.instructions, the chat template or the tokenizer)"
    calls = [call for member in group.trajectories for turn in member.turns for call in turn.calls]
    tools = {call.tool for call in calls if call.problem is None}
    if missing := sorted(tools - set(config.tools.called_names)):
        return f"that call {missing[0]}, which tools.names lacks"
    if scored_anew and any(member.stop_reason for member in group.trajectories):
        return f"scored with another {scored_anew[0]}"
    return ""
