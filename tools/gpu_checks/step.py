"""Check whole training steps in bfloat16 and in FP8: refit and probe, rollout with searches and gains, and update."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

from gpu_checks.bench import Bench
from gpu_checks.models import CITIES, write_checkpoint

MAX_UPDATES = 50
STEPS = 2
"""Number of training steps. The second step tests an engine that has slept twice."""
PROFILED = STEPS + 1
"""The profiled step. It comes last, because the profiler changes the memory in use."""
MAX_SAMPLED_GAP = {"float32": 1e-4, "bfloat16": 0.05}
"""Limit in nats for the mean |difference| between engine and trainer in the log-probs of sampled tokens.

On a CPU in float32, the difference is 1e-6. The limit for bfloat16 is the default of guard.max_train_engine_gap.
"""
MAX_GAIN_GAP = {"float32": 1e-3, "bfloat16": 0.15}
"""Limit in nats for the mean |difference| between engine and trainer in the log-probs of gold answers.

The limits are those of the probe (refit.verify.TOLERANCES), because gold answers are as improbable as the
probe's tokens.
"""
MIN_FP8_GAP, MAX_FP8_GAP = 0.02, 0.3
"""Limits in nats for the difference that `MAX_SAMPLED_GAP` limits, if engine, trainer or both compute in FP8.

In bfloat16 the difference is less than 0.01, so a difference below the lower limit shows that FP8 was not used.
Emulated FP8 (`fp8_study/emulation.py`) changes the log-probs by 0.06, or by 0.09 if both sides round independently.
The upper limit is about three times 0.09, because scales of fused matrices and packed rows are coarser than emulated
scales.
"""
MAX_FP8_GAIN_GAP = 0.8
"""The same limit as `MAX_GAIN_GAP`, but in FP8: the value of refit.verify.TOLERANCES for FP8."""

SAMPLED = "gap/train_engine_abs_mean"
GAIN = "gain/engine_trainer_gap"
FP8_TRAINER = {"model": {"dtype": "bfloat16", "fp8": {"format": "e4m3", "recipe": "blockwise"}}}
FP8_ROLLOUT = {"rollout": {"quantization": "fp8_per_channel"}}
CORRECTION = {"algorithm": {"correction": {"kind": "truncate"}}}


def check_training_step(bench: Bench) -> None:
    """Run training steps with searches in bfloat16, and check that the engine receives changed weights."""
    from a2tgpo.refit.verify import TOLERANCES

    parts, trainer = _start(bench, _profile_settings())
    dtype = parts.config.model.dtype
    tolerance = TOLERANCES[dtype]
    gap = _probe_gap(parts, version=0)
    bench.at_most("refit, probe of first weights", gap, tolerance, "nats")
    for step in range(1, STEPS + 1):
        metrics = _take_step(bench, trainer, f"step {step}")
        bench.at_most(
            f"step {step}, sampled tokens, engine - trainer", metrics[SAMPLED], MAX_SAMPLED_GAP[dtype], "nats"
        )
        bench.at_most(
            f"step {step}, gain scores, engine - trainer", metrics[GAIN], MAX_GAIN_GAP[dtype], "nats"
        )
    if "memory/update_reserved_gib" in metrics:
        context = metrics["memory/update_used_gib"] - metrics["memory/update_reserved_gib"]
        note = "CUDA, NCCL, cuBLAS and the graphs of a tiny model"
        bench.info("card memory outside torch, engine asleep", context, "GiB", note, "context_gib")
    _check_profile(bench, parts, trainer)

    # Change the probe's log-probs by four times the tolerance, so that an engine with the old weights would fail.
    moved_by = _move_weights(parts, target=4 * tolerance)
    bench.at_least("weights moved, log-probs of the probe", moved_by, 4 * tolerance, "nats")
    gap = _probe_gap(parts, version=PROFILED + 1)
    bench.at_most("refit, probe of moved weights", gap, tolerance, "nats")
    _end(parts, trainer)


def _profile_settings() -> dict[str, Any]:
    import torch

    memory = ["update"] if torch.cuda.is_available() else []
    return {"run": {"steps": PROFILED}, "profile": {"steps": [PROFILED], "memory": memory}}


def _check_profile(bench: Bench, parts: Any, trainer: Any) -> None:
    """Take one more step under the profiler, and check that the trace has GPU kernels and a range for each stage."""
    import torch

    with trainer.profiler.step(PROFILED):
        _take_step(bench, trainer, f"step {PROFILED}, profiled")
    folder = Path(parts.config.run.root) / parts.config.run.name / "profile" / f"step_{PROFILED}"
    trace = json.loads(gzip.decompress((folder / f"trace.rank_{bench.rank}.json.gz").read_bytes()))
    events = trace["traceEvents"]
    stages = {event["name"] for event in events if event.get("name", "").startswith("stage: ")}
    bench.at_least("profile, stages in the trace", len(stages), 7, note=", ".join(sorted(stages)))
    if torch.cuda.is_available():
        kernels = sum(event.get("cat") == "kernel" for event in events)
        bench.at_least("profile, kernels in the trace", kernels, 1000)
        snapshot = folder / f"memory_update.rank_{bench.rank}.pickle"
        size = snapshot.stat().st_size if snapshot.exists() else 0
        bench.at_least("profile, memory snapshot", size / 2**20, 0.01, "MiB")


def _probe_gap(parts: Any, *, version: int) -> float:
    import torch.distributed as dist

    from a2tgpo.refit.sync import sync_engine

    metrics = sync_engine(parts.policy, parts.engine, parts.phases, parts.config, version=version)
    return metrics.reduce(dist.group.WORLD)["refit/probe_gap_mean"]


def check_fp8_rollout_step(bench: Bench) -> None:
    """Check training steps with an engine in FP8 and a trainer in bfloat16."""
    _fp8_steps(bench, FP8_ROLLOUT)


def check_fp8_trainer_step(bench: Bench) -> None:
    """Check training steps with a trainer in FP8 and an engine in bfloat16."""
    _fp8_steps(bench, FP8_TRAINER)


def check_fp8_step(bench: Bench) -> None:
    """Check training steps with trainer and engine in FP8, as in configs/precision/fp8.yaml."""
    _fp8_steps(bench, FP8_ROLLOUT, FP8_TRAINER)


def _fp8_steps(bench: Bench, *settings: dict[str, Any]) -> None:
    """Run training steps in FP8, and check that the log-probs of engine and trainer differ by the noise of FP8."""
    parts, trainer = _start(bench, CORRECTION, *settings)
    for step in range(1, STEPS + 1):
        metrics = _take_step(bench, trainer, f"step {step}")
        name = f"step {step}, sampled tokens, engine - trainer"
        bench.at_most(name, metrics[SAMPLED], MAX_FP8_GAP, "nats")
        bench.at_least(f"{name}, FP8 in force", metrics[SAMPLED], MIN_FP8_GAP, "nats")
        bench.at_most(f"step {step}, gain scores, engine - trainer", metrics[GAIN], MAX_FP8_GAIN_GAP, "nats")
        bench.info(f"step {step}, probe after the refit", metrics["refit/probe_gap_mean"], "nats")
    _end(parts, trainer)


def _start(bench: Bench, *settings: dict[str, Any]) -> tuple[Any, Any]:
    """Build a run from its configuration. Return the run's parts and its trainer."""
    from a2tgpo.assemble import assemble, build_checkpoints
    from a2tgpo.config.load import load_config
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.parallel.initialize import initialize
    from a2tgpo.run.folder import RunFolder
    from a2tgpo.trainer import Trainer

    config = load_config(str(write_run(bench, *settings)))
    write_checkpoint(Path(config.model.path))  # before the ranks join, because after that only rank 0 writes
    groups = initialize(config.parallel, seed=0)
    folder = RunFolder(config, groups)
    folder.open("none")
    parts = assemble(config, groups)
    algorithm = config.algorithm
    guards = Guards(config.guard, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
    recorder, checkpoints = folder.recorder(parts.tokenizer, step=0), build_checkpoints(parts, folder, guards)
    return parts, Trainer(parts, recorder, checkpoints, guards, folder=folder)


def _take_step(bench: Bench, trainer: Any, name: str) -> dict[str, float]:
    metrics = trainer.train_step()
    broken = [metric for metric, value in metrics.items() if not math.isfinite(value)]
    note = ", ".join(broken) or f"of {len(metrics)}, {metrics['speed/tokens_per_s']:.4g} sampled tokens/s"
    bench.at_most(f"{name}, metrics that are not finite", len(broken), 0, note=note)
    return metrics


def _end(parts: Any, trainer: Any) -> None:
    import torch.distributed as dist

    from a2tgpo.parallel.initialize import shutdown

    trainer.recorder.close()
    parts.close()
    dist.barrier()
    shutdown()


def _move_weights(parts: Any, *, target: float) -> float:
    """Raise the probe's likelihood with the trainer's own optimizer steps, `MAX_UPDATES` at most.

    Return the mean change of the probe's log-probs, in nats.
    """
    from a2tgpo.batch.packing import pack
    from a2tgpo.refit.verify import probe_tokens, probe_trajectory
    from a2tgpo.update.logprobs import compute_logprobs
    from a2tgpo.update.train_step import train_step

    probe = probe_tokens(parts.engine.num_token_ids, parts.config.refit.probe_tokens)
    batch = pack([probe_trajectory(probe)], [0], align=parts.policy.alignment)
    sampled = batch.loss_mask[0].to(parts.groups.device)

    def loss(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        return -logprobs[sampled].mean() / parts.groups.dp_size, {}

    def logprobs_of_probe() -> Any:
        (scored,) = compute_logprobs(parts.policy, [batch])
        assert scored is not None, "there is one pipeline stage"
        return scored.logprobs[sampled]

    start, moved_by = logprobs_of_probe(), 0.0
    for _ in range(MAX_UPDATES):
        result = train_step(parts.policy, parts.optimizer, [batch], loss)
        if not (result.update_ok and result.grad_norm > 0):
            raise RuntimeError(f"the optimizer step was not taken: {result}")
        moved_by = (logprobs_of_probe() - start).abs().mean().item()
        if moved_by >= target:
            break
    return moved_by


def write_run(bench: Bench, *settings: dict[str, Any]) -> Path:
    """Write the questions, the corpus and the configuration of a run, and return the path of the configuration.

    Args:
        settings: further settings by section. A later argument overrides earlier ones.
    """
    import torch

    folder = bench.work / f"run-{bench.rank}"
    folder.mkdir()
    prompts_per_step = 2 * bench.world_size
    capitals = list(CITIES.items())
    # Write one question for each prompt of a step, so that there are enough questions.
    drawn = [capitals[i % len(capitals)] for i in range(prompts_per_step)]
    questions = [
        {"id": str(i), "question": f"what is the capital of {country}?", "answers": [city]}
        for i, (country, city) in enumerate(drawn)
    ]
    corpus = [
        {"id": str(i), "contents": f"{country}\nThe capital of {country} is {city}."}
        for i, (country, city) in enumerate(capitals)
    ]
    for name, records in (("questions", questions), ("corpus", corpus)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    on_gpu = torch.cuda.is_available()
    config: dict[str, Any] = {
        "run": {"name": "gpu-check", "root": str(folder / "runs"), "steps": STEPS},
        "model": {"path": str(folder / "agent"), "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {
            "train": str(folder / "questions.jsonl"),
            "test": str(folder / "questions.jsonl"),
            "instructions": "",
            "max_prompt_tokens": 128,
        },
        "search": {"corpus": str(folder / "corpus.jsonl"), "top_k": 1},
        "tools": {"max_part_tokens": 64},
        "rollout": {
            "prompts_per_step": prompts_per_step,
            "group_size": 4,
            "max_turns": 2,
            "max_turn_tokens": 32,
            "max_response_tokens": 128,
            "kv_cache_gib": 2.0 if on_gpu else 0.25,
            "gain": {"verify_every": 1},
        },
        "update": {"prompts_per_minibatch": bench.world_size, "lr": 1.0e-4},
    }
    for each in settings:
        for section, values in each.items():
            config.setdefault(section, {}).update(values)
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is valid YAML
    return path
