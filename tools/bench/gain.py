"""Measure what the information gain of a step costs if the engine or the trainer scores the gold answers.

The bench plays a step of SmolLM2-135M in float32 with four trajectories of 2,000 tokens. Each trajectory has six
process turns and a final turn. The engine plays the trajectories, and the trainer trains on them. Each variant scores
the gold answer after the prompt and after every process turn:

    engine   The engine scores each answer with the cached prefix, as in training runs.
    tree     The trainer scores a trajectory in one pass with all answers as branches, as in training runs' checks.
    in full  The trainer scores one row per pair of trajectory and turn, as in the paper's code.

A variant's share of step time is the CPU seconds of its scoring, divided by the CPU seconds of a step. A step
consists of generation, the old policy's log-probs, the update, and the variant's scoring. The bench also counts the
tokens that the model processes. In the bench, the engine scores all contexts after the rollout. In training, it
scores them during the rollout.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import measure
import torch
from engines import EngineWithoutEnd

from a2tgpo.batch.balance import microbatches
from a2tgpo.batch.packing import Alignment, pack, packed_length
from a2tgpo.batch.probes import Probe, ProbedSequence
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.model.build import Policy, build_policy
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.rollout.engine_output import EngineOutput, ScoreOutput
from a2tgpo.trajectory import Call, LogProbs, TokenIds, Trajectory, Turn
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.probe_logprobs import compute_probe_logprobs
from a2tgpo.update.train_step import train_step

MODEL = "artifacts/models/smollm2-135m"
ROUNDS = 2
NUM_TRAJECTORIES = 4
PROMPT, NUM_CALLS, SAMPLED, OBSERVED, FINAL = 200, 6, 100, 190, 60
"""The shape of a trajectory: the tokens of the prompt, the number of process turns, the sampled and the observed
tokens of each process turn, and the tokens of the final turn."""
SCAFFOLD, ANSWER = 10, 6
MAX_TOKENS = 4096
"""Largest number of tokens in one row of the trainer."""


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 49_000) for _ in range(count)]


def play(engine: EngineWithoutEnd, seed: int) -> list[Trajectory]:
    """Play trajectories with prescribed lengths. Each turn is generated after the prompt and all earlier turns."""
    rng = random.Random(seed)
    prompt = random_tokens(rng, PROMPT)
    played = [
        Trajectory(
            prompt_index=0,
            prompt_id="",
            sample_index=sample,
            prompt_tokens=TokenIds(prompt),
            turns=[],
            stop_reason="answer",
        )
        for sample in range(NUM_TRAJECTORIES)
    ]
    for number in range(NUM_CALLS + 1):
        is_final = number == NUM_CALLS
        for trajectory in played:
            length = FINAL if is_final else SAMPLED
            engine.generate(str(trajectory.sample_index), trajectory.tokens, length, rng.getrandbits(60))
        for output in drain(engine):
            assert isinstance(output, EngineOutput)
            played[int(output.request_id)].turns.append(
                Turn(
                    tokens=TokenIds(output.tokens),
                    rollout_logprobs=LogProbs(output.logprobs),
                    observation_tokens=TokenIds([] if is_final else random_tokens(rng, OBSERVED)),
                    calls=[] if is_final else [Call(tool="search", arguments="?")],
                )
            )
    return played


def drain(engine: EngineWithoutEnd) -> list[EngineOutput | ScoreOutput]:
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


class Step:
    """All parts of a step on the same trajectories, timed separately."""

    def __init__(self, engine: EngineWithoutEnd, policy: Policy, optimizer: object, seed: int):
        self.engine, self.policy, self.optimizer = engine, policy, optimizer
        self.seconds: dict[str, float] = {}
        self.model_tokens: dict[str, int] = {}
        rng = random.Random(seed)
        self.scaffold, self.answer = random_tokens(rng, SCAFFOLD), random_tokens(rng, ANSWER)
        self.trajectories: list[Trajectory] = self._timed("generation", lambda: play(engine, seed))
        by_engine = self._timed("engine", self._by_engine)
        old = self._timed("old", lambda: compute_logprobs(policy, self._batches))
        by_tree = self._timed("tree", self._by_tree)
        in_full = self._timed("in full", self._in_full)
        self._timed("update", self._update)
        assert torch.tensor(by_tree).sub(torch.tensor(in_full)).abs().mean() < 1e-3, "the tree is wrong"
        self.answer_gap = torch.tensor(by_engine).sub(torch.tensor(by_tree)).abs().mean().item()
        differences = [
            (scores.logprobs[batch.loss_mask[0]] - batch.rollout_logprobs[batch.loss_mask]).abs()
            for batch, scores in zip(self._batches, old, strict=True)
        ]
        self.sampled_gap = torch.cat(differences).mean().item()

    def share(self, scorer: str) -> tuple[float, float]:
        """Return the CPU seconds of the variant `scorer`, and the CPU seconds of a step with this variant."""
        rest = sum(self.seconds[part] for part in ("generation", "old", "update"))
        return self.seconds[scorer], rest + self.seconds[scorer]

    def _timed(self, name: str, run: Callable[[], list]) -> list:
        start = time.process_time()
        result = run()
        self.seconds[name] = time.process_time() - start
        print(f"  {name}: {self.seconds[name]:.1f} CPU s", flush=True)
        return result

    @property
    def _contexts(self) -> list[tuple[Trajectory, int]]:
        return [(t, length) for t in self.trajectories for length in t.context_lengths]

    @property
    def _batches(self) -> list:
        rows = microbatches([packed_length(t) for t in self.trajectories], MAX_TOKENS)
        return [pack(self.trajectories, row, align=Alignment()) for row in rows]

    def _by_engine(self) -> list[list[float]]:
        for number, (trajectory, length) in enumerate(self._contexts):
            self.engine.submit_score(str(number), [*trajectory.tokens[:length], *self.scaffold], self.answer)
        outputs = sorted(drain(self.engine), key=lambda output: int(output.request_id))
        self.model_tokens["engine"] = sum(o.num_prompt_tokens - o.num_cached_tokens for o in outputs)
        return [output.answer_logprobs for output in outputs if isinstance(output, ScoreOutput)]

    def _by_tree(self) -> list[list[float]]:
        sequences = [
            ProbedSequence(
                tokens=trajectory.tokens,
                probes=[
                    Probe(prefix_length=length, scaffold=tuple(self.scaffold), answer=tuple(self.answer))
                    for length in trajectory.context_lengths
                ],
            )
            for trajectory in self.trajectories
        ]
        self.model_tokens["tree"] = sum(sequence.packed_length for sequence in sequences)
        found = compute_probe_logprobs(self.policy, sequences, max_tokens=MAX_TOKENS)
        return [logprobs for scores in found for logprobs in scores]

    def _in_full(self) -> list[list[float]]:
        turn = Turn(tokens=TokenIds(self.answer), rollout_logprobs=LogProbs([0.0] * ANSWER))
        prefixes = [
            Trajectory(
                prompt_index=0,
                prompt_id="",
                sample_index=0,
                prompt_tokens=TokenIds([*trajectory.tokens[:length], *self.scaffold]),
                turns=[turn],
                stop_reason="answer",
            )
            for trajectory, length in self._contexts
        ]
        lengths = [packed_length(prefix) for prefix in prefixes]
        self.model_tokens["in full"] = sum(lengths)
        rows = microbatches(lengths, MAX_TOKENS)
        batches = [pack(prefixes, row, align=Alignment()) for row in rows]
        found: dict[int, list[float]] = {}
        for row, batch, scores in zip(rows, batches, compute_logprobs(self.policy, batches), strict=True):
            assert scores is not None, "there is one pipeline stage"
            found |= zip(row, scores.logprobs[batch.loss_mask[0]].view(-1, ANSWER).tolist(), strict=True)
        return [found[number] for number in range(len(prefixes))]

    def _update(self) -> list:
        batches = self._batches

        def loss(number: int, logprobs: torch.Tensor, _entropy: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return -logprobs[batches[number].loss_mask[0]].sum() / 1e4, {}

        return [train_step(self.policy, self.optimizer, batches, loss)]


def rows() -> list[measure.Row]:
    groups = initialize(ParallelConfig(), seed=0)
    update = UpdateConfig(lr=1e-6)
    policy = build_policy(ModelConfig(path=MODEL, dtype="float32"), ParallelConfig(), groups, update=update)
    optimizer, _ = build_optimizer(policy, update, total_steps=10)
    config = RolloutConfig(kv_cache_gib=1.0, max_concurrent=64)
    engine = EngineWithoutEnd(MODEL, config=config, model_dtype="float32", max_model_len=2100, seed=0)
    engine.submit_score("warm-up", [5] * 40, [6])
    drain(engine)
    steps = []
    for seed in range(ROUNDS):
        print(f"round {seed + 1}", flush=True)
        steps.append(Step(engine, policy, optimizer, seed))
    engine.close()
    shutdown()
    found = []
    for scorer, words, target in (
        ("engine", "by the engine on cached prefixes", "<= 0.02"),
        ("tree", "by the trainer, all contexts of a trajectory in one pass", ""),
        ("in full", "by the trainer, every prefix in full (the authors' way)", ""),
    ):
        shares = [step.share(scorer) for step in steps]
        found.append(
            measure.compared(
                f"share of step time, {words}",
                [scoring for scoring, _ in shares],
                [whole for _, whole in shares],
                baseline_is="step with it",
                unit="CPU s",
                ratio_is="ours / baseline",
                target=target,
                note=f"{NUM_TRAJECTORIES} trajectories of 2,000 tokens, {NUM_CALLS} process turns",
            )
        )
    tokens = steps[0].model_tokens
    for scorer, words in (("engine", "by the engine"), ("tree", "in one pass of the trainer")):
        found.append(
            measure.compared(
                f"tokens that the model runs for gain, {words}",
                [tokens[scorer]],
                [tokens["in full"]],
                baseline_is="every prefix in full",
                unit="tokens",
            )
        )
    found.append(
        measure.compared(
            "engine against trainer, mean difference of an answer token's log-prob",
            [steps[0].answer_gap],
            [steps[0].sampled_gap],
            baseline_is="of a sampled token's",
            unit="nats",
            ratio_is="ours / baseline",
            note="float32; answers of random tokens; before the first update",
        )
    )
    return found
