"""Measure how a format's rounding changes the log-probs of turns: read or sample turns, score them, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from emulation import RECIPES, emulated
from torch import Tensor

from a2tgpo.config.data import SEARCH_INSTRUCTIONS
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.json_lines import read_json_lines

EPSILON = 3e-3
PIECES = (1, 8, 16, 32, 64, 128, 256)
"""Lengths of the pieces of turns, tokens."""
MIN_PIECES = 8
"""Smallest number of values for which a spread is computed."""
WHOLE = 0
"""The length that stands for whole turns."""

Logprobs = list[list[Tensor]]
"""For each sequence and turn, the log p of the turn's tokens: [tokens] float64, nats."""
Pieces = tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[int]]]]
"""The prompt, then for each turn the policy's text and the observation."""


@dataclass(frozen=True)
class Written:
    """Token ids, and the positions that the policy wrote."""

    tokens: list[int]
    turns: list[tuple[int, int]]
    """First and past-the-end position of each turn; at least 1, since a first token has no log-prob."""


def read_sequences(path: str, tokenizer: Any, *, limit: int) -> list[Written]:
    """Read the first `limit` records of `path`, without turns that have no token.

    Raises:
        ConfigError: one line; the file or a record cannot be read, or none has a turn.
    """
    from a2tgpo.data.demonstrations import load_demonstrations, to_trajectory
    from a2tgpo.data.template import PromptTemplate

    pieces: list[Pieces]
    records = list(read_json_lines(path, key="TEXTS"))[:limit]
    if records and "question" in records[0][1]:
        template = PromptTemplate(tokenizer, SEARCH_INSTRUCTIONS)
        demonstrations = load_demonstrations(path, key="TEXTS")[:limit]
        pieces = [
            (trajectory.prompt_tokens, [(turn.tokens, turn.observation_tokens) for turn in trajectory.turns])
            for trajectory in (
                to_trajectory(demonstration, template=template, tools=("search",), prompt_index=index)
                for index, demonstration in enumerate(demonstrations)
            )
        ]
    else:
        pieces = [_pieces(record, where, tokenizer) for where, record in records]
    sequences = [_sequence(prompt, turns) for prompt, turns in pieces]
    sequences = [sequence for sequence in sequences if sequence.turns]
    if not sequences:
        raise ConfigError(f"TEXTS: {path} has no turn with a token; give demonstrations, rollouts or texts")
    return sequences


def _pieces(record: dict, where: str, tokenizer: Any) -> Pieces:
    """Return the pieces of a rollout or a plain text."""
    if isinstance(record.get("text"), str):
        first, *rest = tokenizer(record["text"], add_special_tokens=False)["input_ids"] or [0]
        return [first], [(rest, [])]
    try:
        turns = [(turn["tokens"], turn["observation_tokens"]) for turn in record["turns"]]
        return list(record["prompt_tokens"]), turns
    except (KeyError, TypeError):
        raise ConfigError(
            f"{where}: no demonstration, rollout or text; give `question` and `turns`, or `prompt_tokens` and "
            "`turns`, or `text`"
        ) from None


def _sequence(prompt: Sequence[int], turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Written:
    tokens, spans = list(prompt), []
    for written, observed in turns:
        if written:
            spans.append((len(tokens), len(tokens) + len(written)))
        tokens += [*written, *observed]
    return Written(tokens, spans)


@torch.no_grad()
def written_by(
    model: Any, sequences: Sequence[Written], length: int, tokenizer: Any, *, seed: int
) -> list[Written]:
    """Sample one turn of `length` tokens from `model` for each prompt (the text before the first turn)."""
    torch.manual_seed(seed)
    prompts = [sequence.tokens[: sequence.turns[0][0]] for sequence in sequences]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=tokenizer.eos_token_id,
    )[:, longest:]
    return [_sequence(prompt, [(turn, [])]) for prompt, turn in zip(prompts, written.tolist(), strict=True)]


@torch.no_grad()
def measure(
    model: Any, exact: Any, sequences: Sequence[Written], recipes: Sequence[str]
) -> dict[str, Logprobs]:
    """Return the log-probs of all turns by format: float32, bfloat16, and each of `recipes` in a bfloat16 model.

    Args:
        model: in bfloat16.
        exact: the same architecture in float32; receives the weights of `model`.
    """
    for target, source in zip(exact.parameters(), model.parameters(), strict=True):
        target.copy_(source)
    results = {"bfloat16": turn_logprobs(model, sequences)}
    for name in recipes:
        with emulated(model.get_decoder(), RECIPES[name]):
            results[name] = turn_logprobs(model, sequences)
    results["float32"] = turn_logprobs(exact, sequences)
    return results


@torch.no_grad()
def turn_logprobs(model: Any, sequences: Sequence[Written]) -> Logprobs:
    """Score like the trainer: logits in the model's format, normalised in float32."""
    results = []
    for sequence in sequences:
        targets = torch.tensor(sequence.tokens)
        hidden = model.get_decoder()(targets[None, :-1]).last_hidden_state[0]  # [T - 1, hidden]
        turns = []
        for first, end in sequence.turns:
            logits = model.lm_head(hidden[first - 1 : end - 1]).float()  # [tokens, vocab]
            logprobs = logits.log_softmax(-1).gather(-1, targets[first:end, None])[:, 0]
            turns.append(logprobs.double())
        results.append(turns)
    return results


@torch.no_grad()
def move_weights(model: Any, drift: float, *, seed: int) -> None:
    """Move every bfloat16 weight by `drift` up or down, with stochastic rounding."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        moved = (weight.float() + drift * signs).view(torch.int32)
        # A bfloat16 is the upper half of a float32. Adding noise to the lower half and cutting it off rounds up with
        # a probability proportional to that half.
        moved += torch.randint(0, 2**16, weight.shape, generator=generator, dtype=torch.int32)
        weight.copy_((moved & -(2**16)).view(torch.float32))


def noise_rows(old: Mapping[str, Logprobs], new: Mapping[str, Logprobs]) -> list[dict[str, Any]]:
    """Return one row per question, format and length."""
    formats = [name for name in old if name != "float32"]
    true_ratio = _difference(new["float32"], old["float32"])
    cases = [("rounding", name, _difference(old[name], old["float32"])) for name in formats]
    cases += [
        ("gap", name, _difference(old[name], old["bfloat16"])) for name in formats if name != "bfloat16"
    ]
    cases += [("ratio", name, _difference(_difference(new[name], old[name]), true_ratio)) for name in formats]
    cases.append(("ratio", "true ratio", true_ratio))
    return [
        {"question": question, "format": name, "length": length, **statistics(means)}
        for question, name, differences in cases
        for length in (WHOLE, *PIECES)
        if len(means := piece_means(differences, length)) >= MIN_PIECES
    ]


def _difference(left: Logprobs, right: Logprobs) -> Logprobs:
    return [[a - b for a, b in zip(ls, rs, strict=True)] for ls, rs in zip(left, right, strict=True)]


def piece_means(differences: Logprobs, length: int) -> Tensor:
    """Return [pieces] means over whole turns (`WHOLE`) or pieces of `length` tokens; drop incomplete pieces."""
    turns = [turn for sequence in differences for turn in sequence]
    if length == WHOLE:
        return torch.stack([turn.mean() for turn in turns])
    return torch.cat([turn[: len(turn) // length * length].view(-1, length).mean(1) for turn in turns])


def statistics(means: Tensor) -> dict[str, float | int]:
    """Summarise turn-mean log-ratios [n]: count, mean, spread, and size relative to epsilon."""
    size = means.abs()
    return {
        "count": len(means),
        "mean": means.mean().item(),
        "std": means.std().item(),
        "mean_abs": size.mean().item(),
        "p95_abs": size.quantile(0.95).item(),
        "share_above_epsilon": (size > EPSILON).double().mean().item(),
    }
