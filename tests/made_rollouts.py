"""Make trajectories from plain rows of gains, for tests of advantages."""

from dataclasses import dataclass

from hypothesis import strategies as st

from a2tgpo.trajectory import Call, Trajectory, Turn

MAX_TURNS, NUM_PROMPTS = 4, 3


@dataclass(frozen=True)
class Row:
    prompt: int
    gains: tuple[float | None, ...]
    outcome: float
    final: bool = True
    """Whether the rollout has a final turn. A rollout without process turns always has a final turn."""

    @property
    def num_turns(self) -> int:
        return len(self.gains) + (self.final or not self.gains)


GRID = st.integers(-64, 64).map(lambda k: k / 64)
"""Strategy for gains whose sums are exact, so that equal gains stay equal."""


def batches(gains=GRID, *, missing=True, min_size=1):
    rows = st.builds(
        Row,
        prompt=st.integers(0, NUM_PROMPTS - 1),
        gains=st.lists(st.none() | gains if missing else gains, max_size=MAX_TURNS).map(tuple),
        outcome=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        final=st.booleans(),
    )
    return st.lists(rows, min_size=min_size, max_size=10)


def trajectories_of(batch: list[Row]) -> list[Trajectory]:
    made = []
    for sample, row in enumerate(batch):
        turns = [
            Turn(
                tokens=[1],
                rollout_logprobs=[0.0],
                calls=[Call(tool="search", arguments="q")],
                observation_tokens=[column % 2],
                info_gain=gain,
            )
            for column, gain in enumerate(row.gains)
        ]
        turns += [Turn(tokens=[2], rollout_logprobs=[0.0])] * (row.num_turns - len(turns))
        made.append(
            Trajectory(
                prompt_index=row.prompt,
                prompt_id=str(row.prompt),
                sample_index=sample,
                prompt_tokens=[0],
                turns=turns,
                stop_reason="answer",
                outcome_reward=row.outcome,
            )
        )
    return made


def z_score(value: float, group: list[float], *, by_std: bool = True, sample: bool = False) -> float:
    """Return the z-score of `value` in `group`, in float64 with the project's stabilisers; 0 if the group has one
    member.
    """
    mean = sum(group) / len(group)
    if len(group) == 1 or not by_std:
        return 0.0 if len(group) == 1 else value - mean
    squares = sum((v - mean) ** 2 for v in group)
    std = (squares / (len(group) - 1)) ** 0.5 if sample else (squares / len(group) + 1e-8) ** 0.5
    return (value - mean) / (std + 1e-6)
