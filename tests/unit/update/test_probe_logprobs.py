"""Scores of answers along a tree equal those of every prefix run in full. The tree runs a trajectory only once."""

import copy
import dataclasses
import math

import pytest
import torch

from a2tgpo.batch.packing import Alignment, pack
from a2tgpo.batch.probes import Probe, ProbedSequence, pack_probes
from a2tgpo.config.rollout import GainConfig
from a2tgpo.reward.info_gain import set_gains
from a2tgpo.trajectory import Call, Trajectory, Turn
from a2tgpo.update.context_scores import ContextScorer
from a2tgpo.update.gain_check import GainCheck
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.probe_logprobs import compute_probe_logprobs

VOCAB = 250


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())


def alone(policy, prefix, probe):
    """Return the log-probs in the usual way: prefix, scaffold and answer run in full as one trajectory."""
    turn = Turn(tokens=list(probe.answer), rollout_logprobs=[0.0] * len(probe.answer))
    trajectory = Trajectory(
        prompt_index=0,
        prompt_id="",
        sample_index=0,
        prompt_tokens=[*prefix, *probe.scaffold],
        turns=[turn],
        stop_reason="answer",
    )
    batch = pack([trajectory], [0], align=Alignment())
    (scores,) = compute_logprobs(policy, [batch])
    return scores.logprobs[batch.loss_mask[0]].tolist()


@pytest.fixture
def sequences():
    scaffold = tokens(3, 1)
    first = [
        Probe(prefix_length=length, scaffold=scaffold, answer=tokens(size, size))
        for length in (1, 17, 40)
        for size in (1, 4, 9)
    ]
    second = [Probe(prefix_length=23, scaffold=scaffold, answer=tokens(5, 7))]
    return [
        ProbedSequence(tokens=tokens(50, 2), probes=first),
        ProbedSequence(tokens=tokens(8, 3), probes=[]),
        ProbedSequence(tokens=tokens(23, 4), probes=second),
    ]


@pytest.mark.parametrize("max_tokens", [10, 10_000])
def test_branches_score_as_their_prefixes_run_in_full(policy, sequences, max_tokens):
    found = compute_probe_logprobs(policy, sequences, max_tokens=max_tokens)
    for sequence, scores in zip(sequences, found, strict=True):
        for probe, logprobs in zip(sequence.probes, scores, strict=True):
            expected = alone(policy, sequence.tokens[: probe.prefix_length], probe)
            assert logprobs == pytest.approx(expected, abs=2e-5)
    assert compute_probe_logprobs(policy, [], max_tokens=10) == []


def test_a_tree_costs_its_trunk_once_and_the_answers(sequences):
    batch = pack_probes(sequences, [0, 1, 2], align=Alignment(row=8))
    trunks, scaffolds = 40 + 23, 2 * 10
    answers = 3 * (1 + 4 + 9) + 5
    assert 0 <= batch.num_tokens - (trunks + scaffolds + answers) < 8
    assert batch.num_tokens % 8 == 0
    assert int(batch.loss_mask.sum()) == answers
    in_full = sum(
        probe.prefix_length + len(probe.branch) for sequence in sequences for probe in sequence.probes
    )
    assert batch.num_tokens < 0.6 * in_full


def test_layers_are_as_before_after_a_tree(policy, sequences):
    trajectory = Probe(prefix_length=1, scaffold=tokens(9, 5), answer=tokens(9, 6))
    before = alone(policy, tokens(30, 8), trajectory)
    compute_probe_logprobs(policy, sequences, max_tokens=10_000)
    assert alone(policy, tokens(30, 8), trajectory) == before


class NumberTokens:
    """Answers written as numbers are read as token ids."""

    def scaffold(self, trajectory, num_turns):
        return [7, 9]

    def aliases(self, answers):
        return [[int(token) for token in answer.split()] for answer in answers]


ANSWERS = ["11 12 13", "14"]


def scorer(*, max_model_len=1000):
    return ContextScorer(
        answer_tokens=NumberTokens(), answers={"q": ANSWERS}, max_model_len=max_model_len, max_tokens=100
    )


@pytest.fixture
def played():
    """A trajectory of two searches and an answer, with contexts of 6, 18 and 30 tokens."""
    return Trajectory(
        prompt_index=0,
        prompt_id="q",
        sample_index=0,
        prompt_tokens=list(tokens(6, 1)),
        turns=[
            Turn(
                tokens=list(tokens(5, number)),
                rollout_logprobs=[0.0] * 5,
                observation_tokens=list(tokens(7, 10 + number)) if number < 2 else [],
                calls=[Call(tool="search", arguments="?")] if number < 2 else [],
                version=2,
            )
            for number in range(3)
        ],
        stop_reason="answer",
    )


def in_full(policy, trajectory, length):
    """Return log-probs of all aliases after the first `length` tokens."""
    return [
        alone(
            policy, trajectory.tokens[:length], Probe(prefix_length=length, scaffold=(7, 9), answer=tuple(a))
        )
        for a in NumberTokens().aliases(ANSWERS)
    ]


def test_the_gap_is_what_the_engine_was_off(policy, played):
    """The engine's scores come from prefixes run in full. One of them is wrong by 0.3 nats per token."""

    def best(length):
        return max(sum(values) / len(values) for values in in_full(policy, played, length))

    played.baseline_prob = math.exp(best(6))
    played.turns[0].answer_prob = None
    played.turns[1].answer_prob = math.exp(best(30) - 0.3)
    check = GainCheck(policy, GainConfig(verify_every=2), scorer())
    assert check.run(1, [played]).values() == {}
    finished_before = copy.deepcopy(played)  # with weights that no longer exist
    finished_before.turns[-1].version, finished_before.baseline_prob = 1, 0.01
    found = check.run(2, [finished_before, played]).values()
    assert found["gain/engine_trainer_gap"] == pytest.approx(0.15, abs=1e-4)
    assert found["gain/engine_trainer_gap_max"] == pytest.approx(0.3, abs=1e-4)
    assert check.run(4, []).values() == {}


def test_contexts_score_as_their_prefixes_run_in_full(policy, played):
    unsearched = dataclasses.replace(played, turns=played.turns[-1:])
    found, other = scorer().score(policy, [played, unsearched])
    for contexts, lengths, trajectory in ((found, [6, 18, 30], played), (other, [6], unsearched)):
        for aliases, length in zip(contexts, lengths, strict=True):
            expected = in_full(policy, trajectory, length)
            for values, alone_values in zip(aliases, expected, strict=True):
                assert values == pytest.approx(alone_values, abs=2e-5)
    assert scorer().score(policy, []) == []


def test_a_context_with_no_room_for_the_answers_has_no_score_and_no_gain(policy, played):
    """The longest answer and its scaffold have 5 tokens. The engine's sequences must be shorter than
    `max_model_len`.
    """
    (fitting,) = scorer(max_model_len=30 + 5 + 1).score(policy, [played])
    assert all(fitting)
    (cut,) = scorer(max_model_len=30 + 5).score(policy, [played])
    assert cut[0] and cut[1] and cut[2] is None
    set_gains(played, cut, measure="probability")
    assert played.turns[0].info_gain is not None and played.turns[1].info_gain is None
