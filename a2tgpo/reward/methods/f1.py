"""Token F1 between the answer and the gold answer that is most similar to it."""

from a2tgpo.config.run import RunConfig
from a2tgpo.reward.answer_match import f1_score
from a2tgpo.reward.episode import Episode


class TokenF1:
    needs_answers = True

    def score(self, episode: Episode) -> float:
        return 0.0 if episode.answer is None else f1_score(episode.answer, episode.answers)


def build(config: RunConfig) -> TokenF1:
    return TokenF1()
