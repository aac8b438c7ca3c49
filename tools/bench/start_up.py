"""Measure the time from the start of launch/train.py to the first sampled token, stage by stage.

The bench runs launch/train.py in one process with SmolLM2-135M in float32 on worldqa. A turn has a single token, so
the first rollout ends with its first token. Times are wall seconds from the run's own `time/startup_*` metrics. The
baseline is a program that uses only transformers and vLLM. The baseline loads the tokenizer, builds an
engine with the same settings, and samples one token.

If the start is warm, vLLM's cache of model architectures is filled. If it is cold, this cache is empty. Python's
__pycache__ and the system's file cache are filled in both cases.

The bench takes about 4 minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import measure

from a2tgpo.metrics.writer import read_metrics

MODEL = "artifacts/models/smollm2-135m"
ROUNDS = 2
STAGES = {
    "imports": "imports",
    "join": "pre-flight and process group",
    "data": "tokenizer and questions",
    "tools": "search index",
    "model": "policy and optimizer",
    "engine": "engine",
}
"""{STAGE of the metric `time/startup_STAGE_s`: label in the table}."""
MAX_MODEL_LEN, KV_CACHE_GIB = 768, 0.5
"""The values of configs/smollm2_cpu.yaml."""

ALONE = """
import json, sys
from pathlib import Path
from a2tgpo.lifecycle.process_age import process_age_s
import transformers
from vllm import LLM, SamplingParams
imports = process_age_s()
engine = LLM(sys.argv[1], dtype="float32", max_model_len=int(sys.argv[2]), kv_cache_memory_bytes=int(sys.argv[3]),
             enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=4096, max_num_seqs=16,
             block_size=32, use_tqdm_on_load=False)
tokens = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("What is the capital of Austria?")["input_ids"]
made = process_age_s()
engine.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1), use_tqdm=False)
Path(sys.argv[4]).write_text(json.dumps({"imports": imports, "engine": made - imports, "total": process_age_s()}))
"""
"""The baseline's program. Its arguments are the model, the longest sequence, the bytes of the KV cache, and the file
for its results."""


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of both variants: the variables that training sets, and vLLM's cache in `cache`."""
    return {
        "PYTHONPATH": str(measure.ROOT),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_COMPILE_DISABLE": "1",
    }


def start(command: list[str], cache: Path) -> None:
    measure.run_program(command[0], [sys.executable, *command], environment(cache))


def product(cache: Path) -> dict[str, float]:
    """Run launch/train.py for one step. Return {stage: seconds}. `total` is the time to the first token."""
    with tempfile.TemporaryDirectory() as root:
        start(
            [
                "launch/train.py",
                "--config",
                "configs/smollm2_cpu.yaml",
                f"run.root={root}",
                "run.steps=1",
                f"model.path={MODEL}",
                "rollout.max_turn_tokens=1",
                "rollout.prompts_per_step=1",
                "update.prompts_per_minibatch=1",
                "evaluation.at_start=false",
                "evaluation.max_questions=1",
                "checkpoint.every=0",
            ],
            cache,
        )
        (step,) = [r for r in read_metrics(Path(root, "smollm2_cpu", "metrics.jsonl")) if r["step"] == 1]
    stages = {stage: step[f"time/startup_{stage}_s"] for stage in STAGES}
    return stages | {"refit": step["time/refit_s"], "total": step["time/startup_to_rollout_s"]}


def alone(cache: Path) -> dict[str, float]:
    """Run the baseline's program. Return {stage: seconds}. `total` is the time to the first token."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        start(["-c", ALONE, MODEL, str(MAX_MODEL_LEN), str(int(KV_CACHE_GIB * 2**30)), str(answer)], cache)
        return json.loads(answer.read_text(encoding="utf-8"))


def rows() -> list[measure.Row]:
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            # Each variant has its own cache, which its first run fills.
            runs = [(name, Path(folder, name)) for name in ("ours", "alone")]
            for name, cache in runs[:: -1 if number % 2 else 1]:
                for state in ("cold", "warm"):
                    taken = product(cache) if name == "ours" else alone(cache)
                    found.setdefault(f"{name}, {state}", []).append(taken)
                    print(f"  {name}, {state}: {taken}", flush=True)
    made = [
        measure.compared(
            f"process start to the first sampled token, {state} cache",
            [run["total"] for run in found[f"ours, {state}"]],
            [run["total"] for run in found[f"alone, {state}"]],
            baseline_is="transformers and vLLM alone, without policy, questions, search and refit",
            unit="s",
            ratio_is="ours / baseline",
            target="<= 1.25" if state == "warm" else "",
            note="SmolLM2-135M, float32, one process",
        )
        for state in ("cold", "warm")
    ]
    warm = found["ours, warm"]
    for stage, words in (STAGES | {"refit": "first refit, weights compared on a probe"}).items():
        made.append(
            measure.compared(
                f"of it {words}, warm cache",
                [run[stage] for run in warm],
                [run["total"] for run in warm],
                baseline_is="the whole start",
                unit="s",
                ratio_is="ours / baseline",
            )
        )
    return made
