"""Load the demonstrations, and split them into training examples and held-out examples."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.config.run import RunConfig
from a2tgpo.data.demonstrations import Demonstration, load_demonstrations
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.environment.tool import tool_schemas
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.protocol.build import build_protocol
from a2tgpo.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The tokenised demonstrations, equal on all ranks."""

    trained: list[Trajectory]
    held_out: list[Trajectory]
    fingerprints: dict[str, str]
    """Fingerprints of the training examples in their order. `demonstrations` covers all tokens, and `responses`
    covers the tokens after the prompts."""

    def require_same(self, state: Mapping[str, Any], *, checkpoint: Path, file: str) -> None:
        """Raise `ConfigError` if the checkpoint with this `state` was trained on other examples.

        Args:
            file: the file of the demonstrations, for the message.
        """
        if state.get("demonstrations") == self.fingerprints["demonstrations"]:
            return
        if state.get("responses") == self.fingerprints["responses"]:
            raise ConfigError(
                f"warmstart: the prompts differ from those that {checkpoint} was trained on, because "
                "data.instructions, the chat template, the tokenizer, or the description or parameters of a tool "
                "changed; restore them, or start over (--resume none)"
            )
        raise ConfigError(
            f"warmstart.demonstrations: {file} differs from the file that {checkpoint} was trained on; give that "
            "file, or start over (--resume none)"
        )


def load_examples(config: RunConfig, *, date: datetime.date) -> Examples:
    """Render and tokenise all demonstrations, and split them into training examples and held-out examples.

    Args:
        date: the date that the prompts give as today's.

    Raises:
        ConfigError: with a one-line message, if the source model or the demonstrations cannot be used, or if too few
            demonstrations remain for training.
    """
    settings = config.warmstart
    try:
        load_hf_config(settings.source)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "warmstart.source", 1)) from None
    tokenizer = load_tokenizer(settings.source, key="warmstart.source")
    protocol = build_protocol(config, tokenizer, schemas=tool_schemas(config), date=date)
    demonstrations = load_demonstrations(settings.demonstrations)
    trajectories = [
        protocol.demonstrate(demonstration, prompt_index=index)
        for index, demonstration in enumerate(demonstrations)
    ]
    chosen = held_out_questions(demonstrations, share=settings.held_out, seed=config.run.seed)
    is_held_out = [demonstration.question.question in chosen for demonstration in demonstrations]
    trained = [item for item, held in zip(trajectories, is_held_out, strict=True) if not held]
    require(
        settings.batch_size <= len(trained),
        "warmstart.batch_size",
        settings.batch_size,
        f"at most the {len(trained)} demonstrations in {settings.demonstrations} that are trained on",
    )
    return Examples(
        trained=trained,
        held_out=[item for item, held in zip(trajectories, is_held_out, strict=True) if held],
        fingerprints={
            "demonstrations": _fingerprint(trained, with_prompts=True),
            "responses": _fingerprint(trained, with_prompts=False),
        },
    )


def held_out_questions(demonstrations: Sequence[Demonstration], *, share: float, seed: int) -> set[str]:
    """Return the held-out questions, which are the fraction `share` of all questions, rounded up.

    The questions are chosen by a hash, so few of them move between training and held-out examples if the file grows.
    """
    questions = {demonstration.question.question for demonstration in demonstrations}

    def place(question: str) -> str:
        return hashlib.blake2b(f"{seed} {question}".encode(), digest_size=8).hexdigest()

    return set(sorted(questions, key=place)[: math.ceil(share * len(questions))])


def _fingerprint(trajectories: Sequence[Trajectory], *, with_prompts: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for trajectory in trajectories:
        pieces = [list(trajectory.prompt_tokens)] if with_prompts else []
        pieces += [
            list(piece) for turn in trajectory.turns for piece in (turn.tokens, turn.observation_tokens)
        ]
        digest.update(repr(pieces).encode())
    return digest.hexdigest()
