"""The rollout of one step on one engine replica: plays and scores every prompt's group of trajectories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.environment.tool import Toolset
from a2tgpo.io.errors import require
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.parallel.collectives import all_reduce_max
from a2tgpo.rollout.answer_scorer import AnswerScorer
from a2tgpo.rollout.answer_tokens import AnswerTokens
from a2tgpo.rollout.carried_group import CarriedGroup, copied
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.multi_turn import Limits, LiveTrajectory, MultiTurnLoop, PromptGroup, Sampling
from a2tgpo.rollout.observation import ObservationEncoder
from a2tgpo.rollout.tool_call import CallSyntax
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool
from a2tgpo.trajectory import Prompt, TokenIds, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from a2tgpo.rollout.vllm_engine import VllmEngine

ScoreTrajectory = Callable[
    [Trajectory, Sequence[str], Sequence[str], Sequence[list[list[float]] | None]], None
]
"""(trajectory, its turns' texts, gold answers, answer log-probs in c_0..c_n per alias; empty if not scored).

Fills in the trajectory's reward and gains. Passed in as a function so that rollout/ does not import reward/.
"""
Progress = Callable[[int, int], None]
"""(finished trajectories, all trajectories)."""
Finished = Callable[[Trajectory], None]
"""Receives a trajectory whose last token is sampled, but whose reward and gains are not computed yet."""


class GroupRollout:
    """Play groups of trajectories on one engine replica.

    Args:
        engine: this rank's engine.
        toolset: the tools that the policy may call; this object does not close it.
        tokenizer: the policy's.
        rollout: the `rollout` section.
        score_trajectory: turns texts and answer log-probs into rewards and gains; see `ScoreTrajectory`.
        opening_tags: the tags that end a prompt (`PromptTemplate.opening_tags`).
        end_of_turn: `PromptTemplate.end_of_turn`; None: only the end of sequence ends a response.
        replica_group: the ranks that share the engine, the first of which calls the tools; None if there is only one.
    """

    def __init__(
        self,
        engine: VllmEngine,
        toolset: Toolset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rollout: RolloutConfig,
        score_trajectory: ScoreTrajectory,
        opening_tags: str = "",
        end_of_turn: int | None = None,
        replica_group: dist.ProcessGroup | None = None,
    ):
        require(
            rollout.tensor_parallel == (1 if replica_group is None else dist.get_world_size(replica_group)),
            "rollout.tensor_parallel",
            rollout.tensor_parallel,
            "the number of ranks that share an engine",
        )
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = rollout
        self._score_trajectory = score_trajectory
        self.opening_tags = opening_tags
        self._stop_tokens = () if end_of_turn is None else (end_of_turn,)
        self.answer_tokens = AnswerTokens(tokenizer, rollout.gain, opening_tags=opening_tags)
        self._syntax = CallSyntax(toolset.names)
        self._observations = ObservationEncoder(
            tokenizer, syntax=self._syntax, max_part_tokens=toolset.max_part_tokens
        )
        self._tools = ToolPool(toolset, replica_group=replica_group)
        self._replica_group = replica_group

    def run(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        step: int,
        greedy: bool = False,
        group_size: int | None = None,
        score_gain: bool = True,
        skip: Container[tuple[int, int]] = (),
        progress: Progress | None = None,
        finished: Finished | None = None,
        is_cut: Callable[[], bool] | None = None,
    ) -> tuple[list[Trajectory], RolloutCounts]:
        """Play `group_size` trajectories of every prompt; all ranks of the engine replica must call this alike.

        Args:
            prompts: this engine replica's share; may be empty.
            seed: seed of the run.
            step: step of the run; seed, step, prompt and sample together determine every draw.
            greedy: always take the most probable token, for evaluation.
            group_size: trajectories per prompt; None: `rollout.group_size`.
            score_gain: score the gold answer in every context.
            skip: (index of the prompt, sample) of trajectories that are not played.
            progress: called whenever a trajectory ends.
            finished: called at the same time with the trajectory.
            is_cut: returns whether to interrupt the rollout; True on one rank of the engine replica is enough. None:
                never. `is_cut` also decides what happens when an `outage` reaches its limit; without `is_cut` that is
                a RuntimeError.

        Returns:
            The trajectories, ordered by prompt, then by sample; and this engine replica's counts.

        Raises:
            ConfigError: if a prompt leaves no room for one token.
            RuntimeError: if the engine failed, or a tool has a bug, hangs too often or stays out of service.
            RolloutCutError: on all ranks of the engine replica, if the rollout was interrupted; the next call starts
                over.
        """
        live = [
            _live(group, _start(group.prompt, sample))
            for group in self._groups(prompts, score_gain=score_gain)
            for sample in range(group_size or self._config.group_size)
            if (group.prompt.index, sample) not in skip
        ]
        sampling = Sampling(
            temperature=0.0 if greedy else self._config.temperature,
            top_p=1.0 if greedy else self._config.top_p,
            seed=seed,
            step=step,
        )
        counts = self._play(
            live, sampling, score_gain=score_gain, progress=progress, finished=finished, is_cut=is_cut
        )
        return [played.trajectory for played in live], counts

    def play_on(
        self,
        groups: Sequence[CarriedGroup],
        *,
        budgets: Sequence[int | None],
        seed: int,
        step: int,
        progress: Progress | None = None,
        is_cut: Callable[[], bool] | None = None,
    ) -> tuple[list[CarriedGroup], RolloutCounts]:
        """Continue or begin the unfinished trajectories of `groups`; all ranks of the engine replica must call this.

        The earlier turns keep their tokens. In a continued trajectory the gold answer is scored again in all
        contexts, so that its gains are differences of one policy's probabilities.

        Args:
            groups: this engine replica's groups; they are not changed.
            budgets: per group, tokens after which a trajectory begins no further turn in this call; None: play it to
                its end.
            seed, step, progress, is_cut: as in `run`; within its first step a group draws the same samples as `run`.

        Returns:
            The groups after this call, and this engine replica's counts. Finished trajectories have rewards and gains
            as in `run`, unfinished ones have none.

        Raises:
            As `run`.
        """
        live: list[LiveTrajectory] = []
        played: list[CarriedGroup] = []
        prompt_groups = self._groups([group.prompt for group in groups], score_gain=True)
        for group, shared, budget in zip(groups, prompt_groups, budgets, strict=True):
            shared.begun = group.begun
            members = group.trajectories or [
                _start(group.prompt, sample) for sample in range(self._config.group_size)
            ]
            members = [member if member.stop_reason else copied(member) for member in members]
            live += [_live(shared, member, budget) for member in members if not member.stop_reason]
            played.append(dataclasses.replace(group, trajectories=members))
        sampling = Sampling(
            temperature=self._config.temperature, top_p=self._config.top_p, seed=seed, step=step
        )
        return played, self._play(live, sampling, score_gain=True, progress=progress, is_cut=is_cut)

    def _play(
        self,
        live: Sequence[LiveTrajectory],
        sampling: Sampling,
        *,
        score_gain: bool,
        progress: Progress | None = None,
        finished: Finished | None = None,
        is_cut: Callable[[], bool] | None = None,
    ) -> RolloutCounts:
        """Play all of `live` and score the finished trajectories."""
        counts = RolloutCounts()

        def on_finished(trajectory: Trajectory) -> None:
            if finished is not None:
                finished(trajectory)
            if progress is not None:
                progress(counts.trajectories, len(live))

        loop = MultiTurnLoop(
            self._engine,
            tools=self._tools,
            syntax=self._syntax,
            observations=self._observations,
            stop_tokens=self._stop_tokens,
            scorer=AnswerScorer(self._engine, self.answer_tokens, counts) if score_gain else None,
            limits=Limits(
                max_turns=self._config.max_turns,
                max_turn_tokens=self._config.max_turn_tokens,
                max_response_tokens=self._config.max_response_tokens,
                max_model_len=self._engine.max_model_len,
            ),
            sampling=sampling,
            counts=counts,
            on_finished=on_finished,
            is_cut=lambda: self._is_cut(is_cut),
        )
        loop.run(live)
        for played in live:
            if played.trajectory.stop_reason:
                self._score(played)
        return counts

    def turn_texts(self, trajectory: Trajectory) -> list[str]:
        """Return the policy's text per turn, without observations and without the token that ended the response.

        A token that reaches past a closing tag is cut there, since the turn ended with the tag.
        """
        return [self._syntax.cut_at_stop(self._decode(turn.tokens)) for turn in trajectory.turns]

    @property
    def outage(self) -> Outage:
        """The state of this engine's wait for a tool's service; callers watch it."""
        return self._tools.outage

    @property
    def tool_names(self) -> tuple[str, ...]:
        """Names of the tools that the policy may call."""
        return self._syntax.names

    def close(self) -> None:
        """Stop the tools' threads; the caller closes engine and toolset."""
        self._tools.close()

    def _is_cut(self, is_asked: Callable[[], bool] | None) -> bool:
        """Whether `is_asked` returns True on any rank of the engine replica.

        Raises:
            ToolFaultError: on all of these ranks, if `is_asked` is None and an outage is at its limit.
        """
        if is_asked is not None:
            return self._agree(is_asked())
        if self._agree(bool(self.outage.verdict)):
            raise ToolFaultError(self.outage.verdict or "a tool's service stays unavailable")
        return False

    def _agree(self, is_cut: bool) -> bool:
        """Whether `is_cut` is True on any rank of the engine replica."""
        if self._replica_group is None:
            return is_cut
        return bool(all_reduce_max(torch.tensor(float(is_cut)), self._replica_group).item())

    def _groups(self, prompts: Sequence[Prompt], *, score_gain: bool) -> list[PromptGroup]:
        for prompt in prompts:
            require(
                len(prompt.tokens) < self._engine.max_model_len,
                f"length of the prompt of question {prompt.id!r}",
                len(prompt.tokens),
                f"< {self._engine.max_model_len} tokens, the longest context of the engine",
            )
        return [
            PromptGroup(
                prompt=prompt, aliases=self.answer_tokens.aliases(prompt.answers) if score_gain else []
            )
            for prompt in prompts
        ]

    def _score(self, played: LiveTrajectory) -> None:
        baseline = played.group.baseline
        contexts = [] if baseline is None else [baseline, *played.scores]
        self._score_trajectory(
            played.trajectory,
            self.turn_texts(played.trajectory),
            played.group.prompt.answers,
            [score.logprobs for score in contexts],
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        ends = (self._tokenizer.eos_token_id, *self._stop_tokens)
        kept = [token for token in tokens if token not in ends]
        return str(
            self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


def _start(prompt: Prompt, sample_index: int) -> Trajectory:
    return Trajectory(
        prompt_index=prompt.index,
        prompt_id=prompt.id,
        sample_index=sample_index,
        prompt_tokens=TokenIds(prompt.tokens),
        turns=[],
        stop_reason="",
        hops=prompt.hops,
    )


def _live(group: PromptGroup, trajectory: Trajectory, budget: int | None = None) -> LiveTrajectory:
    return LiveTrajectory(
        group=group,
        trajectory=trajectory,
        tokens=trajectory.tokens,
        budget=budget,
        num_past_turns=len(trajectory.turns),
    )
