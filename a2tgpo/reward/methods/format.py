"""1 if the format of the response is right, else 0. Use it with `reward.format_gate=false`."""

from a2tgpo.config.run import RunConfig
from a2tgpo.reward.episode import Episode


class RightFormat:
    def score(self, episode: Episode) -> float:
        return float(episode.format_ok)


def build(config: RunConfig) -> RightFormat:
    return RightFormat()
