"""The engine beside the trainer: memory it gives back, weights it is handed, and one whole training step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tools.gpu_checks_model import write_model
from tools.gpu_checks_run import Bench

CACHE_GIB = 4.0
MIN_SHARE = 0.9
"""Of the cache's bytes that must come back when the engine sleeps, and be taken again when it wakes."""
MAX_UPDATES = 50
CITIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Peru": "Lima",
}


def check_engine_memory(bench: Bench) -> None:
    """Bytes in use on the card around sleep and wake, part by part; one rank."""
    import torch

    if not torch.cuda.is_available():
        return bench.skip("engine memory", "no GPU is seen; an engine on a CPU has no memory to give back")
    from a2tgpo.config.rollout import RolloutConfig
    from a2tgpo.rollout.vllm_engine import VllmEngine

    path = write_checkpoint(bench.work / "agent")

    def used() -> float:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    config = RolloutConfig(kv_cache_gib=CACHE_GIB, enforce_eager=True)
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
    return None


def check_training_step(bench: Bench) -> None:
    """Refit and probe, one step of the trainer with searches, and the proof that moved weights arrive."""
    import torch.distributed as dist

    from a2tgpo.assemble import assemble
    from a2tgpo.config.load import load_config
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.parallel.initialize import initialize, shutdown
    from a2tgpo.run_folder import RunFolder
    from a2tgpo.trainer import Trainer
    from a2tgpo.weight_sync import sync_engine

    config = load_config(str(write_run(bench)))
    write_checkpoint(Path(config.model.path))  # transformers writes on the first rank only, once joined
    groups = initialize(config.parallel, seed=0)
    folder = RunFolder(config, groups)
    folder.open("none")
    parts = assemble(config, groups)
    tolerance = config.refit.probe_tolerance
    gap = sync_engine(parts, step=0).reduce(dist.group.WORLD)["refit/probe_gap_mean"]
    bench.at_most("refit, probe of first weights", gap, tolerance, "nats")

    algorithm = config.algorithm
    guards = Guards(config.guard, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
    recorder = folder.recorder(parts, step=0)
    trainer = Trainer(parts, recorder, folder, guards)
    metrics = trainer.train_step()
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    note = ", ".join(broken) or f"of {len(metrics)}, {metrics['speed/tokens_per_s']:.4g} sampled tokens/s"
    bench.at_most("training step, metrics that are not finite", len(broken), 0, note=note)

    # As far as four times the tolerance: an engine that kept its weights could not pass.
    moved_by = _move_weights(parts, target=4 * tolerance)
    bench.at_least("weights moved, log-probs of the probe", moved_by, 4 * tolerance, "nats")
    gap = sync_engine(parts, step=2).reduce(dist.group.WORLD)["refit/probe_gap_mean"]
    bench.at_most("refit, probe of moved weights", gap, tolerance, "nats")
    recorder.writer.close()
    parts.close()
    dist.barrier()
    shutdown()


def _move_weights(parts: Any, *, target: float) -> float:
    """Optimizer steps up the likelihood of the probe, by the trainer's own backward pass and update.

    Returns:
        By how much the probe's log-probs have moved then, nats in the mean: `target`, if `MAX_UPDATES` were enough.
    """
    from a2tgpo.batch.packing import alignment, pack
    from a2tgpo.refit.verify import probe_tokens, probe_trajectory
    from a2tgpo.update.score import score
    from a2tgpo.update.train_step import train_step

    probe = probe_tokens(parts.engine.num_token_ids, parts.config.refit.probe_tokens)
    batch = pack(
        [probe_trajectory(probe)], [0], align=alignment(parts.config.parallel, parts.config.model.fp8)
    )
    sampled = batch.loss_mask[0].to(parts.groups.device)

    def loss(number: int, logprobs: Any, entropy: Any) -> tuple[Any, dict]:
        return -logprobs[sampled].mean() / parts.groups.dp_size, {}

    def logprobs_of_probe() -> Any:
        (scored,) = score(parts.policy, [batch])
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


def write_checkpoint(folder: Path) -> str:
    """The model of the other checks with a tokenizer of its own; returns the folder."""
    from tools.tiny_model import build_tokenizer

    texts = [f"what is the capital of {country}? {city}" for country, city in CITIES.items()] * 4
    tokenizer = build_tokenizer(iter(texts))
    write_model(folder, vocab_size=max(len(tokenizer), 480))
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_run(bench: Bench) -> Path:
    """Questions, corpus and configuration of the step, equal on all ranks but for the folder."""
    import torch

    folder = bench.work / f"run-{bench.rank}"
    folder.mkdir()
    prompts_per_step = 2 * bench.world_size
    capitals = list(CITIES.items())
    asked = [
        capitals[i % len(capitals)] for i in range(prompts_per_step)
    ]  # no step asks for more than there are
    questions = [
        {"id": str(i), "question": f"what is the capital of {country}?", "answers": [city]}
        for i, (country, city) in enumerate(asked)
    ]
    corpus = [
        {"id": str(i), "contents": f"{country}\nThe capital of {country} is {city}."}
        for i, (country, city) in enumerate(capitals)
    ]
    for name, records in (("questions", questions), ("corpus", corpus)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    on_gpu = torch.cuda.is_available()
    config = {
        "run": {"name": "gpu-check", "root": str(folder / "runs"), "steps": 2},
        "model": {"path": str(folder / "agent"), "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {
            "train": str(folder / "questions.jsonl"),
            "test": str(folder / "questions.jsonl"),
            "instructions": "",
            "max_prompt_tokens": 128,
        },
        "search": {"corpus": str(folder / "corpus.jsonl"), "top_k": 1, "max_passage_tokens": 64},
        "rollout": {
            "prompts_per_step": prompts_per_step,
            "group_size": 4,
            "max_turns": 2,
            "max_turn_tokens": 32,
            "max_response_tokens": 128,
            "kv_cache_gib": 2.0 if on_gpu else 0.25,
        },
        "update": {"prompts_per_minibatch": bench.world_size, "lr": 1.0e-4},
        "refit": {"probe_tolerance": 0.15 if on_gpu else 1.0e-3},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path
