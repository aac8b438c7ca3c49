"""Compare the speed of the agent loop with the speed of the engine alone, for tools that take 0, 50 and 200 ms.

A small model plays 64 trajectories, two for each slot of the engine. Each trajectory has up to four searches. The
lengths of turns have a long-tailed distribution with a mean of about 130 tokens, and are the same in all variants:

    loop      This project plays: a trajectory continues as soon as its own search has returned.
    waves     All trajectories generate until the slowest has ended its turn. Then all wait for the slowest search.
    engine    vLLM generates alone: every turn follows the previous turn at once, without tools or judging.

Tokens/s are sampled tokens divided by wall seconds. An engine step takes about 10 ms, as for a large model on a GPU,
so tool calls and Python take realistic shares of the time.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import measure
from engines import PlannedEngine
from transformers import AutoTokenizer

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.template import PromptTemplate
from a2tgpo.environment.tool import Toolset
from a2tgpo.protocol.tags import TagProtocol
from a2tgpo.rollout.counts import RolloutCounts
from a2tgpo.rollout.engine_output import EngineOutput
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt, Trajectory

MODEL = "artifacts/models/tiny-qwen3"
ROUNDS = 2
NUM_PROMPTS, GROUP_SIZE, CONCURRENT = 16, 4, 32
PROMPT, MEDIAN, LONGEST, MAX_TURNS, OBSERVED = 200, 110, 400, 4, 100
DELAYS_MS = (0, 50, 200)
WORKERS = 64
MAX_MODEL_LEN = 3072


class WaitingTool:
    """A search tool that waits for a fixed time, then returns one fixed passage for any query."""

    def __init__(self, delay_s: float):
        self.delay_s = delay_s

    def call(self, text: str) -> list[str]:
        time.sleep(self.delay_s)
        return [f"{text} " + "la " * OBSERVED]

    def close(self) -> None:
        """Do nothing, because this tool holds no resources."""


@dataclass
class Played:
    """A trajectory of the loop, with the prompt, lengths and observations that the other variants replay."""

    prompt: list[int]
    lengths: list[int]
    observations: list[list[int]]


def make_prompts() -> list[Prompt]:
    rng = random.Random(0)
    return [
        Prompt(
            index=number,
            id=str(number),
            question="?",
            answers=("la la",),
            tokens=tuple(rng.randrange(20, 470) for _ in range(PROMPT)),
        )
        for number in range(NUM_PROMPTS)
    ]


class Variants:
    """Plays the same trajectories in each variant, on one engine."""

    def __init__(self, model: Path) -> None:
        self.config = RolloutConfig(
            kv_cache_gib=0.5,
            max_concurrent=CONCURRENT,
            dtype="float32",
            group_size=GROUP_SIZE,
            max_turns=MAX_TURNS,
            max_response_tokens=MAX_MODEL_LEN - PROMPT,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.protocol = TagProtocol(PromptTemplate(self.tokenizer, ""), tools=("search",))
        self.engine = PlannedEngine(
            str(model),
            median=MEDIAN,
            longest=LONGEST,
            call_share=0.75,
            config=self.config,
            model_dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            seed=0,
        )
        self.prompts = make_prompts()
        trajectories, self.counts = self.play_loop(0)
        self.played = [_played(trajectory) for trajectory in trajectories]
        self.num_tokens = sum(trajectory.num_sampled_tokens for trajectory in trajectories)

    def play_loop(self, delay_ms: int, *, gain: bool = False) -> tuple[list[Trajectory], RolloutCounts]:
        toolset = Toolset(tools={"search": WaitingTool(delay_ms / 1000)}, max_concurrent_calls=WORKERS)
        rollout = GroupRollout(
            self.engine,
            toolset,
            self.protocol,
            rollout=self.config,
        )
        self.engine.forget()
        counts = RolloutCounts()
        playing = rollout.play(self.prompts, seed=0, version=0, score_gain=gain, counts=counts)
        trajectories = [done.trajectory for done in rollout.finished(playing)]
        rollout.close()
        trajectories.sort(key=lambda trajectory: (trajectory.prompt_index, trajectory.sample_index))
        return trajectories, counts

    def play_alone(self) -> None:
        """Play all trajectories without tools. Submit each next turn as soon as the previous turn has ended."""
        self.engine.forget()
        contexts = {str(number): list(played.prompt) for number, played in enumerate(self.played)}
        turns = dict.fromkeys(contexts, 0)
        for name in contexts:
            self._submit(name, contexts[name], 0)
        while self.engine.has_unfinished:
            for output in self.engine.step():
                assert isinstance(output, EngineOutput)
                name = output.request_id
                contexts[name] += output.tokens
                if self._goes_on(name, turns[name]):
                    contexts[name] += self.played[int(name)].observations[turns[name]]
                    turns[name] += 1
                    self._submit(name, contexts[name], turns[name])

    def play_waves(self, delay_ms: int) -> None:
        """Play all trajectories in waves: all generate a turn, then all search, then all generate the next turn."""
        self.engine.forget()
        tool = WaitingTool(delay_ms / 1000)
        contexts = {str(number): list(played.prompt) for number, played in enumerate(self.played)}
        turn = 0
        with ThreadPoolExecutor(WORKERS) as pool:
            while contexts:
                for name, tokens in contexts.items():
                    self._submit(name, tokens, turn)
                while self.engine.has_unfinished:
                    for output in self.engine.step():
                        assert isinstance(output, EngineOutput)
                        contexts[output.request_id] += output.tokens
                contexts = {name: c for name, c in contexts.items() if self._goes_on(name, turn)}
                list(pool.map(tool.call, contexts))
                for name, tokens in contexts.items():
                    tokens += self.played[int(name)].observations[turn]
                turn += 1

    def _goes_on(self, name: str, turn: int) -> bool:
        return turn + 1 < len(self.played[int(name)].lengths)

    def _submit(self, name: str, tokens: list[int], turn: int) -> None:
        self.engine.generate(name, tokens, self.played[int(name)].lengths[turn], int(name) * 100 + turn)


def _played(trajectory: Trajectory) -> Played:
    return Played(
        prompt=list(trajectory.prompt_tokens),
        lengths=[len(turn.tokens) for turn in trajectory.turns],
        observations=[turn.observation_tokens.tolist() for turn in trajectory.turns],
    )


def longer_model(folder: Path) -> Path:
    """Copy the model to `folder`, with a higher context limit than in its training. Return `folder`."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": MAX_MODEL_LEN}))
    return folder


def rows() -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(longer_model(Path(folder)))
    runs: dict[str, Callable[[], object]] = {"engine": variants.play_alone}
    for delay in DELAYS_MS:
        runs[f"loop {delay}"] = functools.partial(variants.play_loop, delay)
        runs[f"waves {delay}"] = functools.partial(variants.play_waves, delay)
    runs["loop 200 gain"] = functools.partial(variants.play_loop, 200, gain=True)
    seconds = measure.interleaved(runs, rounds=ROUNDS, clock=time.perf_counter, warm_up=False)
    speed = {name: [variants.num_tokens / s for s in values] for name, values in seconds.items()}
    found = []

    def compare(name: str, ours: str, baseline: str, words: str, target: str = "") -> None:
        row = measure.compared(
            name,
            speed[ours],
            speed[baseline],
            baseline_is=words,
            unit="tokens/s",
            ratio_is="ours / baseline",
            target=target,
        )
        found.append(row)

    for delay in DELAYS_MS:
        target = ">= 0.9" if delay == 200 else ""
        compare(f"agent loop, tools of {delay} ms", f"loop {delay}", "engine", "vLLM alone", target)
    compare(
        "agent loop with gain, tools of 200 ms",
        "loop 200 gain",
        "engine",
        "vLLM alone, without it",
        ">= 0.94",
    )
    for delay in DELAYS_MS:
        compare(f"agent loop, tools of {delay} ms", f"loop {delay}", f"waves {delay}", "wave by wave")
    counts = variants.counts
    found.append(
        measure.compared(
            "tokens of known prefixes computed again",
            [float(counts.known_prefix_tokens - counts.cached_prefix_tokens)],
            [float(counts.known_prefix_tokens)],
            baseline_is="all of them",
            unit="tokens",
            ratio_is="ours / baseline",
            target="<= 0.05",
            note="blocks of 32 tokens",
        )
    )
    variants.engine.close()
    return found
