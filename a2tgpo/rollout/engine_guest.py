"""Keep vLLM from changing the trainer's process state, and adapt some of vLLM's methods."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from a2tgpo.parallel.determinism import ENGINE_NCCL_VARIABLES

MAX_CACHE_HIT = "max_cache_hit"
_COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
_VARIABLES_KEPT = (
    *("LOCAL_WORLD_SIZE", "LD_PRELOAD", "OMP_NUM_THREADS", _COMPILE_THREADS),
    # With batch-invariant kernels, vLLM limits its communicators to one channel. The trainer's communicators need all
    # channels.
    *(*ENGINE_NCCL_VARIABLES, "NCCL_NO_CACHE"),
)


def cap_cache_hits(manager: Any) -> None:
    """Let a request limit its prefix-cache hit to N tokens, with SamplingParams(extra_args={"max_cache_hit": N})."""
    get_computed_blocks: Callable = manager.get_computed_blocks
    find_longest: Callable = manager.coordinator.find_longest_cache_hit
    cap: int | None = None

    def capped_find_longest(block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        length = max_length if cap is None else min(max_length, cap)
        return find_longest(block_hashes, length, *args, **kwargs)

    def capped_get_computed_blocks(request: Any) -> Any:
        nonlocal cap
        params = request.sampling_params
        cap = (params.extra_args or {}).get(MAX_CACHE_HIT) if params is not None else None
        try:
            return get_computed_blocks(request)
        finally:
            cap = None

    manager.coordinator.find_longest_cache_hit = capped_find_longest
    manager.get_computed_blocks = capped_get_computed_blocks


def abort_in_order(core: Any) -> None:
    """Make `core`, vLLM's EngineCore, free the blocks of aborted requests in the order of the abort call.

    By default, vLLM's scheduler frees these requests in the order of a Python set
    (vllm/v1/core/sched/scheduler.py, finish_requests). Each rank adds a random suffix to the ids of requests, so
    the order differs between the ranks of an engine. Evictions, cache hits and schedules would then also differ
    between the ranks. This also concerns requests that have written a stop string, because vLLM aborts them.
    """
    abort: Callable[[list[str]], None] = core.abort_requests

    def abort_one_by_one(request_ids: list[str]) -> None:
        for request_id in request_ids:
            abort([request_id])

    core.abort_requests = abort_one_by_one


def return_experts_on_first_rank(scheduler: Any, is_first_rank: bool) -> None:
    """Let the ranks of an engine run although only the first of them returns experts.

    Each rank has its own scheduler, which expects experts from the rank's worker (vllm/v1/core/sched/scheduler.py,
    update_from_output). But only the worker of the first tensor-parallel rank keeps experts
    (vllm/distributed/aux_output_connector/worker.py). Without this function, the schedulers of the other ranks would
    raise an AssertionError in the first step.
    """
    if not is_first_rank:
        scheduler.aux_output_connector = None


def inspect_here(registry: Any, architectures: Sequence[str]) -> None:
    """Let vLLM inspect the model classes of these architectures in this process.

    By default vLLM's registry of models starts another process for the inspection, so that this process does not
    initialise CUDA. The other process takes 10 s, and the trainer has initialised CUDA anyway.
    """
    for name in architectures:
        if name in registry.models:
            registry.register_model(name, registry.models[name].load_model_cls())


def leave_out_token_texts(record: Any) -> None:
    """Keep vLLM from decoding every token of a request's log-probs, because nothing reads these texts.

    The texts in which vLLM looks for stop strings do not change.
    """
    record.logprobs_processor.tokenizer = None


def keep_last_rows(record: Any, count: int) -> None:
    """Let vLLM convert only the last `count` log-probs of a request's prompt to Python objects."""
    processor = record.logprobs_processor
    update: Callable = processor._update_prompt_logprobs

    def update_last(rows: Any) -> None:
        update(tuple(column[-count:] for column in rows[:3]))  # token ids, log-probs and ranks

    processor._update_prompt_logprobs = update_last


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """On exit, restore the trainer's environment variables and Inductor's number of compile threads.

    Importing vllm sets the number of threads to 1 for the whole process (vllm/env_override.py).
    """
    variables = {name: os.environ.get(name) for name in _VARIABLES_KEPT}
    threads = _inductor_threads()
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _set_inductor_threads(threads)


def _inductor_threads() -> int | None:
    """Return Inductor's number of compile threads, or None if no number is set."""
    return getattr(sys.modules.get("torch._inductor.config"), "compile_threads", None)


def _set_inductor_threads(threads: int | None) -> None:
    inductor: Any = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.compile_threads = inductor.decide_compile_threads() if threads is None else threads


@contextlib.contextmanager
def preserved_host_state() -> Iterator[None]:
    """On exit, restore the environment variables and random generators that an engine's construction changes.

    Inside the context, kernels compile with one thread, as vLLM requires. The garbage collector examines only objects
    that are created inside the context, because vLLM starts five collections. When the engine shuts down, vLLM makes
    the collector examine all objects again.
    """
    gc.collect()
    gc.freeze()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        with environment_kept():
            os.environ[_COMPILE_THREADS] = "1"
            _set_inductor_threads(1)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda_states)
