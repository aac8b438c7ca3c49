"""Exact match between the answer and a gold answer (Eq. 14)."""

from a2tgpo.config.run import RunConfig
from a2tgpo.reward.answer_match import exact_match
from a2tgpo.reward.episode import Episode


class ExactMatch:
    needs_answers = True

    def score(self, episode: Episode) -> float:
        return 0.0 if episode.answer is None else exact_match(episode.answer, episode.answers)


def build(config: RunConfig) -> ExactMatch:
    return ExactMatch()
