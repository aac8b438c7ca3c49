"""Scoring, training, checkpoints and the warm start over real gloo processes (see update_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS_OF = {
    "gradients": "dp4 tp2 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "output_rows": "dp4 tp2 tp2_sequence pp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "turn_ratios": "pp2_vpp2 cp2 tp2_cp2_sequence cp2_pp2_vpp2 tp2_pp2",
    "probes": "dp4 tp2_sequence pp2_vpp2",
    "scores": "dp4 tp2_sequence pp2_vpp2 pp2 pp2_uneven cp2 tp2_cp2_sequence tp2_pp2",
    "update": "pp2_vpp2 pp2_uneven cp2 tp2_cp2_sequence cp2_pp2_vpp2",
    "correction": "dp4 cp2 cp2_pp2_vpp2 tp2_pp2",
    "nan_is_skipped": "dp4 pp2_vpp2 pp2 cp2 tp2_pp2",
    "resume": "dp4 pp2_vpp2 cp2 tp2_pp2",
    "another_layout": "pp2_vpp2 pp2 tp2_cp2_sequence tp2_pp2",
    "values_of_another_layout": "pp2_vpp2 tp2_cp2_sequence tp2_pp2",
    "earlier_format": "dp4",
    "earlier_format_of_another_layout": "tp2_pp2",
    "resume_with_buckets": "dp4",
    "resume_bfloat16": "dp4",
    "resume_whole_optimizer": "dp4",
    "host_memory": "dp4",
    "memory_phases": "pp2_vpp2",
    "memory_phases_with_buckets": "dp4",
    "data_parallel_updates": "dp4",
    "retention": "dp4",
    "one_best": "dp4",
}
CHECKS = [f"{check}[{layout}]" for check, layouts in LAYOUTS_OF.items() for layout in layouts.split()]

pytestmark = pytest.mark.distributed


def start(num_ranks: int, script: Path, *arguments: str) -> subprocess.Popen:
    launcher = (
        [sys.executable]
        if num_ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    )
    outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        env={key: value for key, value in os.environ.items() if key not in outside},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout_s: float) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("update")
    finish(start(4, Path(__file__).with_name("update_worker.py"), str(folder)), 300)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_update(results, check) -> None:
    """Each check states its claim in update_worker.py."""
    assert results[check] == ""


def test_every_check_of_the_worker_is_looked_at(results) -> None:
    assert sorted(results) == sorted(CHECKS)


# -- warm start ----------------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<search>", "</search>", "<result>", "</result>", "<answer>", "</answer>"]
WORDS = ["where", "is", "up", "down", "north", "south", "a", "b", "c", "d", "e", "f"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
WARMSTART_STEPS = 12


def make_model(folder: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *TAGS, *WORDS]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def make_demonstrations(path: Path) -> None:
    lines = []
    for number in range(20):
        first, second = WORDS[number % 12], WORDS[(5 * number + 3) % 12]
        searches = [
            {
                "text": f"<think> {first} </think> <search> where {second} </search>",
                "observation": f" <result>\n{second} is {first} {second}\n</result>",
            }
        ] * (number % 3)
        turns = [*searches, {"text": f"<think> {second} </think> <answer> {first} </answer>"}]
        lines.append(
            json.dumps(
                {"id": str(number), "question": f"where is {first}", "answers": [first], "turns": turns}
            )
        )
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def warm_starts(tmp_path_factory) -> dict[int, Path]:
    """Folders of the same warm start on 1 and on 2 ranks: `model` (made), `out`, `runs`, `output.txt`."""
    folders, running = {}, {}
    for num_ranks in (1, 2):
        folder = folders[num_ranks] = tmp_path_factory.mktemp(f"warmstart_{num_ranks}")
        make_model(folder / "model")
        make_demonstrations(folder / "demonstrations.jsonl")
        sections = {
            "run": {"name": "w", "root": str(folder / "runs"), "seed": 4},
            "model": {"path": str(folder / "out"), "dtype": "float32"},
            "data": {"train": "unused", "test": "unused", "instructions": ""},
            "search": {"corpus": "unused"},
            "update": {"max_microbatch_tokens": 64},
            "warmstart": {
                "source": str(folder / "model"),
                "demonstrations": str(folder / "demonstrations.jsonl"),
                "steps": WARMSTART_STEPS,
                "batch_size": 8,
                "lr": 0.01,
            },
        }
        (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
        script = ROOT / "launch" / "warmstart.py"
        running[num_ranks] = start(num_ranks, script, "--config", str(folder / "config.yaml"))
    for num_ranks, process in running.items():
        (folders[num_ranks] / "output.txt").write_text(finish(process, 200))
    return folders


def warm_start_losses(folder: Path) -> list[float]:
    lines = (folder / "runs" / "w-warmstart" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["warmstart/loss"] for line in lines]


def test_a_warm_start_does_the_same_on_any_number_of_ranks(warm_starts) -> None:
    one, two = (warm_start_losses(warm_starts[num_ranks]) for num_ranks in (1, 2))
    assert len(one) == WARMSTART_STEPS
    assert two == pytest.approx(one, rel=1e-3)
    assert two[0] == pytest.approx(one[0], rel=1e-6)


def test_a_warm_start_learns_the_policys_tokens(warm_starts) -> None:
    losses = warm_start_losses(warm_starts[2])
    assert losses[-1] < losses[0] - 1.0
    assert "loss" in (warm_starts[2] / "output.txt").read_text().splitlines()[-1]


def test_a_warm_started_model_is_a_checkpoint_that_transformers_loads(warm_starts) -> None:
    """And it gives its tokens the loss that the last step reported, or less."""
    folder = warm_starts[2]
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "where is a"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    text = tokenizer("<think> b </think> <answer> a </answer>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(prompt) + text])
    loss = model(input_ids=torch.tensor([prompt + text]), labels=labels).loss.item()
    assert loss < warm_start_losses(folder)[0] - 1.0
