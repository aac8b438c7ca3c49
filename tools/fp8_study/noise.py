"""Measure how the rounding of a number format changes the log-probs of turns."""

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
"""Lengths in tokens of the pieces into which turns are cut."""
MIN_PIECES = 8
"""Smallest number of pieces for which statistics are computed."""
WHOLE = 0
"""The length that means whole turns instead of pieces."""

Logprobs = list[list[Tensor]]
"""The log-probs of each turn's tokens, [tokens] float64 in nats, by sequence and turn."""
Pieces = tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[int]]]]
"""Token ids of the prompt, and for each turn the token ids of the policy's text and of the observation."""


@dataclass(frozen=True)
class Written:
    """The token ids of a sequence, and the positions of the tokens that the policy wrote."""

    tokens: list[int]
    turns: list[tuple[int, int]]
    """(first position, position after the last) of each turn. The first position is at least 1, because the first
    token of a sequence has no log-prob."""


def read_sequences(path: str, tokenizer: Any, *, limit: int) -> list[Written]:
    """Return the sequences of the first `limit` records of `path`, without empty turns.

    Raises:
        ConfigError: with a one-line message, if the file or a record cannot be read, or if no record has a turn.
    """
    from a2tgpo.data.demonstrations import load_demonstrations
    from a2tgpo.data.template import PromptTemplate
    from a2tgpo.protocol.tag_demonstration import to_trajectory

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
    """Return the token ids of a record, which is either a recorded trajectory or a plain text."""
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
    """After the prompt of each sequence, sample one turn of `length` tokens from `model`."""
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
    """Return {format: log-probs of all turns} for float32, bfloat16 and each recipe in `recipes`.

    Args:
        model: the model in bfloat16, in which the recipes are emulated.
        exact: a model of the same architecture in float32. Its weights are overwritten by the weights of `model`.
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
    """Return the log-probs of all turns, from logits in the model's format and a log-softmax in float32."""
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
    """Add or subtract `drift` at random for every bfloat16 weight, and round the result stochastically."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        moved = (weight.float() + drift * signs).view(torch.int32)
        # Round stochastically. A bfloat16 is the upper half of a float32. With random noise added to the lower half,
        # the upper half grows by one unit with a probability proportional to the lower half.
        moved += torch.randint(0, 2**16, weight.shape, generator=generator, dtype=torch.int32)
        weight.copy_((moved & -(2**16)).view(torch.float32))


def noise_rows(old: Mapping[str, Logprobs], new: Mapping[str, Logprobs]) -> list[dict[str, Any]]:
    """Return a row for each combination of a question of study.py (rounding, gap, ratio), a format and a length.

    Args:
        old, new: the results of `measure` before and after `move_weights`.
    """
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
    """Cut all turns into pieces of `length` tokens, drop incomplete pieces, and return the mean of each piece
    [pieces].

    If `length` is `WHOLE`, each turn is one piece.
    """
    turns = [turn for sequence in differences for turn in sequence]
    if length == WHOLE:
        return torch.stack([turn.mean() for turn in turns])
    return torch.cat([turn[: len(turn) // length * length].view(-1, length).mean(1) for turn in turns])


def statistics(means: Tensor) -> dict[str, float | int]:
    """Return count, mean and spread of log-ratio means [n], and the share of means whose absolute value exceeds
    epsilon."""
    size = means.abs()
    return {
        "count": len(means),
        "mean": means.mean().item(),
        "std": means.std().item(),
        "mean_abs": size.mean().item(),
        "p95_abs": size.quantile(0.95).item(),
        "share_above_epsilon": (size > EPSILON).double().mean().item(),
    }
