"""Checks of partial rollouts on real engines, which refit_worker runs on its 2 ranks.

One engine over both ranks plays four steps. The last two steps are played again from the checkpoint after the second
step: once by the same engine, and once by one engine on each rank. These two engines share the carried groups.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
import torch.distributed as dist
from played import rewarded, tags
from scripted_search import ScriptedSearch, toolset_of
from tiny_models import CAPITALS

from a2tgpo.assemble import build_checkpoints, build_rollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import StepRollout
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.guard import GuardConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import PartialConfig, RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import ExtrapolationConfig, UpdateConfig
from a2tgpo.data.question_set import Question
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet, PromptTemplate
from a2tgpo.evaluate.sets import EvaluationSets
from a2tgpo.loss.entropy import EntropyWeight
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.metrics.guards import Guards
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.engine_group import build_engine_group
from a2tgpo.refit.handover import refit
from a2tgpo.run.folder import RunFolder
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.optimizer import build_optimizer

SETTINGS = dict(
    prompts_per_step=3,
    group_size=2,
    max_turns=3,
    max_turn_tokens=48,
    partial=PartialConfig(tokens_per_step=1, extra_prompts=3, max_staleness=2),
)
"""Settings of the `rollout` section. A trajectory pauses after each turn, and three groups are carried over."""
NUM_STEPS, SAVED_STEP = 4, 2
TOLERANCE = 2e-5
"""Largest allowed difference in log-probs (nats) and probabilities between engines over one rank and over two ranks.
The real difference is some 1e-6.
"""


def trainer_parts(policy):
    """Return the parts of a trainer that are saved and restored."""
    update = UpdateConfig(prompts_per_minibatch=SETTINGS["prompts_per_step"])
    optimizer, schedule = build_optimizer(policy, update, total_steps=NUM_STEPS)
    phases = MemoryPhases(policy, optimizer=optimizer)
    entropy_weight = EntropyWeight(AlgorithmConfig())
    return dict(
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        entropy_weight=entropy_weight,
        extrapolation=Extrapolation(ExtrapolationConfig()),
        phases=phases,
    )


class Run:
    """The parts of a run that play, save and restore. Both ranks have one instance and make the same calls."""

    def __init__(self, root, path, rollout, groups, *, trainer, engine, tokenizer):
        config = RunConfig(
            run=RunSettings(name="run", root=root),
            model=ModelConfig(path=path, dtype="float32"),
            data=DataConfig(train="unused", test="unused"),
            search=SearchConfig(corpus="unused"),
            rollout=rollout,
            update=UpdateConfig(prompts_per_minibatch=rollout.prompts_per_step),
            parallel=ParallelConfig(tensor=2),
            algorithm=AlgorithmConfig(correction=CorrectionConfig(kind="truncate")),
        )
        asked = ["ruler of Japan?", "capital of Peru?", "loop?", "ruler of Italy?", "capital of France?"]
        questions = [
            Question(id=str(number), question=question, answers=(CAPITALS.get(question[11:-1], "none"),))
            for number, question in enumerate(3 * asked)
        ]
        engine_group = build_engine_group(config, groups)
        template = PromptTemplate(tokenizer, "")
        self.parts = SimpleNamespace(
            config=config,
            groups=groups,
            engine_group=engine_group,
            state=RolloutState(sampler=PromptSampler(len(questions), rollout.prompts_per_step, seed=0)),
            train_prompts=PromptSet(questions, template, max_prompt_tokens=64),
            test_sets=EvaluationSets({"test": PromptSet(questions, template, max_prompt_tokens=64)}),
            **trainer,
            engine=engine,
            rollout=build_rollout(
                config,
                engine_group,
                engine=engine,
                toolset=toolset_of(ScriptedSearch()),
                protocol=tags(tokenizer, gain=rollout.gain),
            ),
        )
        self._folder = RunFolder(config, groups)
        guards = Guards(GuardConfig(), clip_low=0.2, clip_high=0.2)
        self._checkpoints = build_checkpoints(self.parts, self._folder, guards)

    def play(self, step, should_stop=None):
        """Return the trajectories that all replicas together train on in `step`, and the groups that they carry over.
        Return None if both ranks interrupted the rollout.
        """
        parts = self.parts
        # As in a real run, a refit empties the engine's cache between two steps.
        version = parts.engine.weight_version + 1
        assert not refit(parts.policy, parts.engine, version=version, bucket_mib=1).skipped
        rollout = rewarded(parts.rollout, should_stop=should_stop)
        steps = StepRollout(
            parts.config.rollout, rollout, parts.train_prompts, parts.state, parts.engine_group
        )
        played = steps.play(version=step)
        share = played and played.trajectories
        state, engines = parts.state.carried, parts.engine_group
        ranks = all_gather_object((engines.index, engines.is_leader, share, state), dist.group.WORLD)
        if any(theirs is None for _, _, theirs, _ in ranks):
            assert all(theirs is None for _, _, theirs, _ in ranks), "one rank was broken off, the other not"
            return None
        for index, is_first, theirs, other in ranks:
            assert other.entries == state.entries, "the ranks differ in what is carried over"
            assert index != engines.index or other == state, "the ranks of an engine hold other groups"
            assert is_first or not theirs, "the step holds trajectories twice"
        first = [(theirs, other.own) for _, is_first, theirs, other in ranks if is_first]
        trained = sorted(
            (member for theirs, _ in first for member in theirs),
            key=lambda member: (member.prompt_index, member.sample_index),
        )
        return trained, sorted((group for _, own in first for group in own), key=lambda group: group.key)

    def save(self, step):
        self._checkpoints.save(step)
        self._checkpoints.finish_saving()

    def restore(self):
        """Restore the state in the checkpoint, whatever the number of engines that saved it."""
        assert self._checkpoints.restore(self._folder.open("auto", accept_changes=True)) == SAVED_STEP

    def close(self):
        self.parts.rollout.close()


def check_one_engine_over_both_ranks_carries_groups_on(run):
    """Carried groups continue from a checkpoint bit for bit. Return the results of each step."""
    played = []
    for step in range(NUM_STEPS):
        if step == SAVED_STEP:
            run.save(step)
        played.append(run.play(step))
    for step, (trained, carried) in enumerate(played):
        places = [(member.prompt_index, member.sample_index) for member in trained]
        assert places == list(itertools.product(range(3), range(2))), places
        assert all(member.stop_reason for member in trained) and len(carried) == 3
        assert any(not group.is_complete for group in carried), "nothing was stopped by the budget"
        assert step == 0 or max(member.staleness(step) for member in trained) >= 1, "nothing went on"
    run.restore()
    assert [run.play(step) for step in range(SAVED_STEP, NUM_STEPS)] == played[SAVED_STEP:]
    looks = itertools.count()
    is_second_rank = run.parts.groups.rank == 1
    assert run.play(NUM_STEPS, should_stop=lambda: is_second_rank and next(looks) > 0) is None
    return played


def check_an_engine_per_rank_plays_what_the_one_carried(run, played):
    """Two engines continue from the checkpoint of one engine. Both play some of its groups, and the steps have the
    same results.
    """
    run.restore()
    shares = all_gather_object(run.parts.state.carried.own, dist.group.WORLD)
    assert all(any(not group.is_complete for group in share) for share in shares), "not shared out"
    for step in range(SAVED_STEP, NUM_STEPS):
        found, expected = members(run.play(step)), members(played[step])
        assert list(map(course, found)) == list(map(course, expected))
        torch.testing.assert_close(
            measures(found), measures(expected), atol=TOLERANCE, rtol=0, equal_nan=True
        )


def check_engines_take_prompts_on_demand(run):
    """Two engines, each with 2 slots, play 8 prompts, and take 6 of them from a queue. The trajectories equal those
    with fixed shares, to the bit.
    """
    parts, found = run.parts, {}
    for assignment in ("fixed", "on_demand"):
        config = RolloutConfig(
            **SETTINGS | dict(prompts_per_step=8, partial=PartialConfig()),
            max_concurrent=2,
            assignment=assignment,
        )
        rollout = build_rollout(
            SimpleNamespace(rollout=config),
            parts.engine_group,
            engine=parts.engine,
            toolset=toolset_of(ScriptedSearch()),
            protocol=parts.rollout.protocol,
        )
        state = RolloutState(sampler=PromptSampler(len(parts.train_prompts), 8, seed=0))
        steps = StepRollout(config, rewarded(rollout), parts.train_prompts, state, parts.engine_group)
        played = steps.play(version=0)
        rollout.close()
        shares = all_gather_object(played.trajectories, dist.group.WORLD)
        assert all(shares), "an engine played nothing"
        found[assignment] = sorted(itertools.chain(*shares), key=lambda t: (t.prompt_index, t.sample_index))
        taken = all_gather_object(played.metrics.values().get("assignment/taken_groups"), dist.group.WORLD)
        assert taken == [None, None] if assignment == "fixed" else sum(taken) == 6, taken
    fixed, on_demand = found["fixed"], found["on_demand"]
    assert len(fixed) == 16 and list(map(course, on_demand)) == list(map(course, fixed))
    torch.testing.assert_close(measures(on_demand), measures(fixed), atol=0, rtol=0, equal_nan=True)


def members(step):
    """Return the trajectories that a step trained on, and then the trajectories that it carried over."""
    trained, carried = step
    return [*trained, *(member for group in carried for member in group.trajectories)]


def course(member):
    """Return all values that do not depend on an engine's rounding."""
    turns = [(turn.version, turn.tokens, turn.observation_tokens, turn.query) for turn in member.turns]
    return member.prompt_index, member.prompt_id, member.sample_index, member.stop_reason, turns


def measures(trajectories):
    """Return the log-probs of all sampled tokens and the probabilities of the answers. A missing value is nan."""
    values = [
        value
        for member in trajectories
        for value in (
            *(logprob for turn in member.turns for logprob in turn.rollout_logprobs),
            *member.context_probs,
        )
    ]
    return torch.tensor([float("nan") if value is None else value for value in values])
