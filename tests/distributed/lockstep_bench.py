"""One engine over 2 ranks with a small cache, and a record of the decisions of its schedulers (see
lockstep_worker).
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections import Counter
from types import SimpleNamespace

from played import rewarded, run, tags
from scripted_search import ScriptedSearch, toolset_of
from tiny_models import CAPITALS, SCRIPTS
from transformers import AutoTokenizer

from a2tgpo.assemble import build_rollout
from a2tgpo.collect.state import RolloutState
from a2tgpo.collect.step import StepRollout
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.config.data import DataConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig, RunSettings
from a2tgpo.config.search import SearchConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.data.question_set import Question
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet, PromptTemplate
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.engine_group import build_engine_group
from a2tgpo.rollout.vllm_engine import VllmEngine

BLOCK_TOKENS = 32
BLOCK_BYTES = BLOCK_TOKENS * 512  # float32, 2 layers, keys and values of one head of 32 on each rank
MAX_MODEL_LEN = 512
EVICTING, PREEMPTING = 40, 18
"""Two numbers of blocks in the cache. With the first, 16 sequences of up to 6 blocks fit while they run, but not
between their turns. With the second, they do not even fit while they run. One sequence of `MAX_MODEL_LEN` takes 17
blocks.
"""
QUESTIONS = [question for question in SCRIPTS if question.startswith(("capital", "ruler"))]


class ShuffledSearch(ScriptedSearch):
    """A search whose answers arrive in another order than the calls."""

    def __init__(self, seed):
        super().__init__(failing=["capital of Peru"])
        self._draw = random.Random(seed)

    def search(self, query):
        with self._lock:
            delay = self._draw.choice((0.0, 0.001, 0.004, 0.01))
        threading.Event().wait(delay)
        return super().search(query)


class Schedule:
    """Compares the decisions of this rank's scheduler with those of the other rank's, before each pass is
    computed.
    """

    def __init__(self, engine, group):
        self.seen = Counter()
        self._group = group
        self._freed, self._ended = [], 0
        core = engine._engine.engine_core.engine_core
        self._scheduler, self._pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
        for owner, name, watched in (
            (self._scheduler, "schedule", self._schedule),
            (self._scheduler, "_free_request", self._free_request),
            (self._scheduler, "_preempt_request", self._preempt_request),
            (self._pool, "free_blocks", self._free_blocks),
            (self._pool, "_maybe_evict_cached_block", self._evict),
        ):
            setattr(owner, name, functools.partial(watched, getattr(owner, name)))

    def _schedule(self, schedule, *args, **kwargs):
        output = schedule(*args, **kwargs)
        cached = output.scheduled_cached_reqs
        decided = {
            "requests": [named(request_id) for request_id in output.num_scheduled_tokens],
            "tokens": list(output.num_scheduled_tokens.values()),
            "cached tokens": [request.num_computed_tokens for request in output.scheduled_new_reqs],
            "computed tokens": list(cached.num_computed_tokens),
            "freed blocks": self._freed,
            "free blocks": [block.block_id for block in self._pool.free_block_queue.get_all_free_blocks()],
        }
        self.seen["passes"] += 1
        self.seen["passes with several ends"] += self._ended > 1
        mine, theirs = all_gather_object(decided, self._group)
        for what in decided:
            assert mine[what] == theirs[what], (
                f"pass {self.seen['passes']}, {what}: {mine[what]} on rank 0, {theirs[what]} on rank 1"
            )
        self._freed, self._ended = [], 0
        return output

    def _free_request(self, free, request, *args, **kwargs):
        self._ended += 1
        return free(request, *args, **kwargs)

    def _preempt_request(self, preempt, *args, **kwargs):
        self.seen["preemptions"] += 1
        return preempt(*args, **kwargs)

    def _free_blocks(self, free, blocks):
        blocks = list(blocks)
        self._freed += [block.block_id for block in blocks]
        return free(blocks)

    def _evict(self, evict, *args, **kwargs):
        evicted = evict(*args, **kwargs)
        self.seen["evictions"] += bool(evicted)
        return evicted


def named(request_id):
    return request_id.rpartition("-")[0]


class Bench:
    """The objects that all claims share."""

    def __init__(self, path, groups):
        self.path, self.rank, self.group = path, groups.rank, groups.tp_group
        self.groups = groups
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @contextlib.contextmanager
    def open(self, *, search, blocks=EVICTING, guarded=False, watched=True, limits=None, **settings):
        """Yield the parts of a run that plays, with a new engine, and a `Schedule`, which is None unless
        `watched`.
        """
        rollout = RolloutConfig(
            tensor_parallel=2,
            check_lockstep_every=int(guarded),
            kv_cache_gib=(blocks * BLOCK_BYTES + 1) / 2**30,
            max_concurrent=16,
            dtype="float32",
            group_size=4,
            max_turns=3,
            max_turn_tokens=48,
            max_response_tokens=MAX_MODEL_LEN - 128,
            prompts_per_step=6,
            **settings,
        )
        correction = CorrectionConfig(kind="truncate" if rollout.partial.is_on else "none")
        advantage = "at2po" if rollout.tree.is_on else "turn_group"
        config = RunConfig(
            run=RunSettings(name="run"),
            model=ModelConfig(path=self.path, dtype="float32"),
            data=DataConfig(train="unused", test="unused"),
            search=SearchConfig(corpus="unused"),
            rollout=rollout,
            update=UpdateConfig(prompts_per_minibatch=rollout.prompts_per_step),
            algorithm=AlgorithmConfig(advantage=advantage, correction=correction),
        )
        engine_group = build_engine_group(config, self.groups)
        engine = VllmEngine(
            self.path,
            config=rollout,
            model_dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            seed=0,
            replica_group=engine_group.group,
        )
        questions = [
            Question(id=f"{number}", question=question, answers=(CAPITALS.get(question[11:-1], "none"),))
            for number, question in enumerate(3 * QUESTIONS)
        ]
        template = PromptTemplate(self.tokenizer, "")
        prompts = PromptSet(questions, template, max_prompt_tokens=64)
        toolset = toolset_of(search, **(limits or {}))
        parts = SimpleNamespace(
            config=config,
            groups=self.groups,
            engine_group=engine_group,
            state=RolloutState(sampler=PromptSampler(len(questions), rollout.prompts_per_step, seed=0)),
            train_prompts=prompts,
            rollout=build_rollout(
                config,
                engine_group,
                engine=engine,
                toolset=toolset,
                protocol=tags(self.tokenizer, gain=rollout.gain),
            ),
        )
        try:
            yield parts, Schedule(engine, self.group) if watched else None
        finally:
            parts.rollout.close()
            engine.close()

    def play(self, parts, *, seed, num_prompts=9, **settings):
        """Play, check that both ranks played the same trajectories, and return the trajectories."""
        prompts = parts.train_prompts.prompts(range(num_prompts))
        trajectories, counts = run(parts.rollout, prompts, seed=seed, **settings)
        self.assert_equal([trajectory.to_dict() for trajectory in trajectories])
        return trajectories, counts

    def steps(self, parts):
        return StepRollout(
            parts.config.rollout,
            rewarded(parts.rollout),
            parts.train_prompts,
            parts.state,
            parts.engine_group,
        )

    def assert_equal(self, value):
        mine, theirs = all_gather_object(value, self.group)
        assert mine == theirs, "the ranks played different rollouts"

    def raised(self, error_class, play):
        """Return the message of the error that `play` raises on both ranks."""
        message = "nothing was raised"
        try:
            play()
        except error_class as error:
            message = str(error)
        self.assert_equal(message)
        return message
