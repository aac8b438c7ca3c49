"""Score the gold answers in all contexts of trajectories with a Megatron model, in one pass per trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from a2tgpo.batch.probes import Probe, ProbedSequence
from a2tgpo.model.policy import Policy
from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.probe_logprobs import compute_probe_logprobs


@dataclass(frozen=True, kw_only=True)
class ContextScorer:
    """Scores the same answers in the same contexts as the engine (`rollout.answer_scorer`)."""

    answer_tokens: AnswerTokens
    answers: Mapping[str, Sequence[str]]
    """The gold answers of each question, by the question's id."""
    max_model_len: int
    """Largest number of tokens in a sequence of the engine. A context whose answers do not fit gets no scores."""
    max_tokens: int
    """Number of positions in one packed row."""

    def score(
        self, model: Policy, trajectories: Sequence[Trajectory]
    ) -> list[list[list[list[float]] | None]]:
        """Return, for each trajectory and context, the log-prob of each token of each alias, in nats.

        Every rank must call this. All ranks of a data-parallel replica must pass the same trajectories, possibly
        none, and get the same result. A context gets None if the answers do not fit, or if there is no answer to
        score.
        """
        sequences = [self._probed(trajectory) for trajectory in trajectories]
        found = compute_probe_logprobs(model, sequences, max_tokens=self.max_tokens)
        return [
            self._by_context(trajectory, sequence, logprobs)
            for trajectory, sequence, logprobs in zip(trajectories, sequences, found, strict=True)
        ]

    def _probed(self, trajectory: Trajectory) -> ProbedSequence:
        aliases = self.answer_tokens.aliases(self.answers[trajectory.prompt_id])
        longest = max(map(len, aliases), default=0)
        probes = []
        for num_turns, length in enumerate(trajectory.context_lengths):
            scaffold = tuple(self.answer_tokens.scaffold(trajectory, num_turns))
            if length + len(scaffold) + longest < self.max_model_len:
                probes += [
                    Probe(prefix_length=length, scaffold=scaffold, answer=tuple(alias)) for alias in aliases
                ]
        return ProbedSequence(tokens=trajectory.tokens, probes=probes)

    def _by_context(
        self, trajectory: Trajectory, sequence: ProbedSequence, logprobs: list[list[float]]
    ) -> list[list[list[float]] | None]:
        by_length: dict[int, list[list[float]]] = {}
        for probe, values in zip(sequence.probes, logprobs, strict=True):
            by_length.setdefault(probe.prefix_length, []).append(values)
        return [by_length.get(length) for length in trajectory.context_lengths]
