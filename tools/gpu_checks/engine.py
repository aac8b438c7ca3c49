"""Check the engine alone: the memory that its sleep frees, its speed, and the effect of asynchronous scheduling."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.plan.dimensions import ModelDimensions

from gpu_checks.bench import Bench
from gpu_checks.models import SMALL, VOCAB_SIZE, slice_dimensions, write_checkpoint

CACHE_GIB = 4.0
MIN_SHARE = 0.9
"""Smallest share of the KV cache's bytes that sleep must free, and that wake must allocate again."""
PREFILL_TOKENS = 2048
MAX_RESCORED_GAP = {"float32": 1e-4, "bfloat16": 0.05}
"""Limit in nats for the mean |difference| between two log-probs of each sampled token: one from sampling, one from a
later scoring of the finished sequence."""
MAX_RESCORED = 16
"""Largest number of sequences that are scored again, one by one."""
MAX_SHARE_OTHER = 0.5
"""Largest accepted share of requests whose tokens change if asynchronous scheduling is switched on.

Asynchronous scheduling changes which requests share a batch, and so the rounding of bfloat16. One different token
changes all later tokens of a request. If the scheduler mixed up requests, nearly all requests would change.
"""


@dataclass(frozen=True, kw_only=True)
class Play:
    """The model and the requests for an engine. A `Play` is pickled and sent to a separate process."""

    path: str
    dtype: str
    cache_gib: float
    sequences: int
    """Number of concurrent sequences. In the second of two rounds, every sequence continues after an observation."""
    tokens: int
    """Largest number of tokens sampled per sequence and round."""
    async_scheduling: bool = False


@dataclass(frozen=True, kw_only=True)
class Played:
    tokens: dict[str, list[int]]
    """{request id: sampled tokens}."""
    alone_s: float
    """Mean seconds of an engine step while a single sequence runs."""
    together_s: float
    """Mean seconds of an engine step in the first round, in which `sequences` sequences run."""
    tokens_per_s: float
    rescored_gap: float
    """Mean |difference| in nats between the log-probs from sampling and from scoring (see `MAX_RESCORED_GAP`)."""


def check_engine_memory(bench: Bench) -> None:
    """Check that sleep frees GPU memory, and that waking the weights and then the KV cache allocates it again."""
    import torch

    from a2tgpo.config.rollout import RolloutConfig
    from a2tgpo.rollout.vllm_engine import VllmEngine

    path = write_checkpoint(bench.work / "agent")

    def used() -> float:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    config = RolloutConfig(kv_cache_gib=CACHE_GIB, enforce_eager=True, gpu_memory_fraction=0.5)
    engine = VllmEngine(path, config=config, model_dtype="bfloat16", max_model_len=1024, seed=0)
    seen = {"awake": used()}
    engine.sleep()
    seen["asleep"] = used()
    for part in ("weights", "kv_cache"):
        engine.wake(part)
        seen[f"{part} woken"] = used()
    note = ", ".join(f"{name} {gib:.2f} GiB" for name, gib in seen.items())
    floor = MIN_SHARE * CACHE_GIB
    bench.at_least("engine sleeps, memory given back", seen["awake"] - seen["asleep"], floor, "GiB", note)
    bench.at_least("engine wakes, memory taken again", seen["kv_cache woken"] - seen["asleep"], floor, "GiB")
    engine.close()


def check_engine_speed(bench: Bench) -> None:
    """Measure how fast the engine decodes with and without asynchronous scheduling, and how fast a slice prefills."""
    import torch

    on_gpu = torch.cuda.is_available()
    # Build the model without token ids that the tokenizer lacks. Sampling masks such ids, but scoring does not, so
    # the log-probs would differ.
    path = write_checkpoint(bench.work / "agent", dataclasses.replace(SMALL, vocab=0))
    settings = Play(
        path=path,
        dtype="bfloat16" if on_gpu else "float32",
        cache_gib=1.0 if on_gpu else 0.1,
        sequences=64 if on_gpu else 8,
        tokens=64 if on_gpu else 24,
    )
    off = in_own_process(play, settings)
    per_sequence = max(0.0, (off.together_s - off.alone_s) / (settings.sequences - 1))
    note = f"a tiny model, async scheduling off; {off.tokens_per_s:.4g} tokens/s"
    limit = MAX_RESCORED_GAP[settings.dtype]
    bench.at_most("sampled tokens scored again", off.rescored_gap, limit, "nats")
    bench.info("engine step, one sequence", 1e3 * off.alone_s, "ms", note, "decode_step_ms")
    bench.info(
        "engine step, one more sequence",
        1e6 * per_sequence,
        "us",
        f"of {settings.sequences}",
        "decode_sequence_us",
    )
    if not on_gpu:
        bench.skip("async scheduling", "needs a GPU: vLLM turns it off on CPUs")
        return bench.skip(
            "engine prefill of the slice", "needs a GPU: a measurement on a CPU does not predict a card"
        )
    on = in_own_process(play, Play(**vars(settings) | {"async_scheduling": True}))
    different = sum(tokens != on.tokens[request] for request, tokens in off.tokens.items())
    count = len(off.tokens)
    bench.at_most("async scheduling, sampled tokens scored again", on.rescored_gap, limit, "nats")
    name = "async scheduling, requests with other tokens"
    bench.at_most(name, different, MAX_SHARE_OTHER * count, note=f"of {count}")
    bench.info("async scheduling, speed on / off", on.tokens_per_s / off.tokens_per_s, "")
    given = bench.settings
    dimensions = slice_dimensions(given.like, tensor=given.tensor, layers=given.layers, on_gpu=on_gpu)
    sliced = write_engine_slice(bench.work / "slice", dimensions)
    rate, note = in_own_process(prefill, (sliced, dimensions))
    bench.info("engine prefill of the slice", rate / 1e12, "TFLOP/s", note, "prefill_tflops")
    return None


def write_engine_slice(folder: Path, dimensions: ModelDimensions) -> str:
    """Write the slice as a Qwen3 model that an engine can load, and return its folder.

    vLLM's Qwen2 would derive a wrong number of channels per head. Qwen3 reads this number from its configuration.
    """
    as_qwen3 = dataclasses.replace(dimensions, architecture="qwen3")
    return write_checkpoint(folder, as_qwen3, max_positions=PREFILL_TOKENS + 64)


def in_own_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """Return `function(argument)` from a new process, because vLLM's memory pool allows one engine per process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, argument).result()


def play(settings: Play) -> Played:
    """Build an engine, and run the requests of `settings` on it."""
    from a2tgpo.config.rollout import RolloutConfig
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(
        kv_cache_gib=settings.cache_gib,
        max_concurrent=settings.sequences,
        gpu_memory_fraction=0.3,
        async_scheduling=settings.async_scheduling,
    )
    engine = VllmEngine(settings.path, config=config, model_dtype=settings.dtype, max_model_len=512, seed=0)
    try:
        return play_on(engine, settings)
    finally:
        engine.close()


def play_on(engine: Any, settings: Play) -> Played:
    """Decode one sequence alone, then `settings.sequences` sequences concurrently in two rounds.

    Every request has its own seed. Every second sequence ends early with a stop string, as a tool call does.
    """
    from a2tgpo.refit.verify import probe_tokens

    ids = [token % min(engine.num_token_ids, VOCAB_SIZE) for token in probe_tokens(VOCAB_SIZE, 4096)]
    limits = {"max_tokens": settings.tokens, "temperature": 1.0, "top_p": 1.0}
    engine.submit("warm", ids[:16], seed=0, stop=(), **limits)
    _drain(engine)
    engine.submit("alone", ids[16:32], seed=1, stop=(), **limits)
    alone, seconds, steps = _drain(engine)
    alone_s = seconds / steps
    sampled, total_s, together_s = dict(alone), 0.0, 0.0
    contexts = {f"{number}": ids[number : number + 32] for number in range(settings.sequences)}
    for turn in (1, 2):
        for name, context in contexts.items():
            seed = 1000 * turn + int(name)
            stop = ("a",) if int(name) % 2 else ()
            engine.submit(f"{name}.{turn}", context, seed=seed, stop=stop, **limits)
        found, seconds, steps = _drain(engine)
        sampled |= found
        total_s += seconds
        if turn == 1:
            together_s = seconds / steps
            contexts = {
                name: [*context, *found[f"{name}.1"].tokens, *ids[:8]] for name, context in contexts.items()
            }
    gaps = []
    for name, context in list(contexts.items())[:MAX_RESCORED]:
        output = sampled[f"{name}.2"]
        again = engine.sequence_logprobs([*context, *output.tokens])[-len(output.tokens) :]
        gaps += [abs(a - b) for a, b in zip(again, output.logprobs, strict=True)]
    count = sum(len(output.tokens) for output in sampled.values()) - len(sampled["alone"].tokens)
    return Played(
        tokens={name: output.tokens for name, output in sampled.items()},
        alone_s=alone_s,
        together_s=together_s,
        tokens_per_s=count / total_s,
        rescored_gap=sum(gaps) / len(gaps),
    )


def prefill(sliced: tuple[str, ModelDimensions]) -> tuple[float, str]:
    """Prefill long prompts in an engine. Return floating point operations per second, and a text with the time."""
    from a2tgpo.config.rollout import RolloutConfig
    from a2tgpo.plan.flops import forward_flops
    from a2tgpo.refit.verify import probe_tokens
    from a2tgpo.rollout.vllm_engine import ON_GPU, VllmEngine

    path, dimensions = sliced
    length, count = (PREFILL_TOKENS, 8) if ON_GPU else (256, 2)
    config = RolloutConfig(kv_cache_gib=2.0 if ON_GPU else 0.1, max_concurrent=count, gpu_memory_fraction=0.5)
    engine = VllmEngine(path, config=config, model_dtype="bfloat16", max_model_len=length + 32, seed=0)
    best = float("inf")
    for attempt in range(3):
        ids = probe_tokens(engine.num_token_ids, (attempt + 1) * length * count)[-length * count :]
        for number in range(count):
            context = ids[number * length : (number + 1) * length]
            engine.submit(f"{number}", context, max_tokens=1, seed=None, temperature=0.0, top_p=1.0, stop=())
        best = min(best, _drain(engine)[1])
    engine.close()
    operations = length * count * forward_flops(dimensions, context=length / 2, output_share=1 / length).total
    return operations / best, f"{count} prompts of {length} tokens in {1e3 * best:.4g} ms, best of 3"


def _drain(engine: Any) -> tuple[dict[str, Any], float, int]:
    """Step the engine until all requests are finished. Return {request id: output}, the seconds and the steps."""
    outputs: dict[str, Any] = {}
    steps, start = 0, time.perf_counter()
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
        steps += 1
    return outputs, time.perf_counter() - start, steps
