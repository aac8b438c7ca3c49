"""Warm starts on real gloo processes, undisturbed or ended by kills and signals (see warm_start_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from preloaded.command import PYTHON
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from a2tgpo.warmstart.target import MARKER

pytestmark = pytest.mark.distributed

TAGS = ["<think>", "</think>", "<search>", "</search>", "<result>", "</result>", "<answer>", "</answer>"]
WORDS = ["where", "is", "up", "down", "north", "south", "a", "b", "c", "d", "e", "f"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
STEPS = 12


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
def folder(tmp_path_factory) -> Path:
    """The folder of one worker. It has the models `one`, `two` and `ended`, `runs/`, and `codes.json` with the exit
    code of each start.
    """
    root = tmp_path_factory.mktemp("warm_start")
    make_model(root / "model")
    make_demonstrations(root / "demonstrations.jsonl")
    sections = {
        "run": {"name": "unset", "root": str(root / "runs"), "seed": 4},
        "model": {"path": "unset", "dtype": "float32"},
        "data": {"train": "unused", "test": "unused", "instructions": ""},
        # Corpus and server do not exist, because a warm start needs neither an engine nor a server.
        "search": {"backend": "http", "url": "http://127.0.0.1:9/retrieve"},
        "rollout": {"tensor_parallel": 7},
        "update": {"max_microbatch_tokens": 64},
        "warmstart": {
            "source": str(root / "model"),
            "demonstrations": str(root / "demonstrations.jsonl"),
            "steps": STEPS,
            "batch_size": 8,
            "lr": 0.01,
            "evaluate_every": 5,
            "checkpoint_every": 1,
        },
    }
    (root / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    outside = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("warm_start_worker.py")), str(root)],
        env={key: value for key, value in os.environ.items() if key not in outside},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    (root / "output.txt").write_text(done.stdout)
    return root


def records_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / "runs" / f"{name}-warmstart" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(folder: Path, name: str) -> list[float]:
    return [record["warmstart/loss"] for record in records_of(folder, name) if record["step"]]


def test_a_warm_start_does_the_same_on_any_number_of_ranks(folder) -> None:
    one, two = losses_of(folder, "one"), losses_of(folder, "two")
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-3)
    assert two[0] == pytest.approx(one[0], rel=1e-6)


def test_a_warm_start_learns_the_policys_tokens(folder) -> None:
    losses = losses_of(folder, "two")
    assert losses[-1] < losses[0] - 1.0
    assert "warm start: 12 steps in" in (folder / "output.txt").read_text()


def test_a_warm_start_reports_the_loss_of_what_it_does_not_train_on(folder) -> None:
    one, two = (
        {
            r["step"]: r["warmstart/held_out_loss"]
            for r in records_of(folder, name)
            if "warmstart/held_out_loss" in r
        }
        for name in ("one", "two")
    )
    assert list(one) == [0, 5, 10, STEPS]
    assert two == pytest.approx(one, rel=1e-3) and one[STEPS] < one[0]


def test_a_warm_started_model_is_a_checkpoint_that_transformers_loads(folder) -> None:
    """The loss of the loaded model is at most the loss that the last step reported."""
    model = AutoModelForCausalLM.from_pretrained(folder / "two")
    tokenizer = AutoTokenizer.from_pretrained(folder / "two")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "where is a"}], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    text = tokenizer("<think> b </think> <answer> a </answer>", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(prompt) + text])
    loss = model(input_ids=torch.tensor([prompt + text]), labels=labels).loss.item()
    assert loss < losses_of(folder, "two")[0] - 1.0


def test_a_warm_start_that_is_killed_and_stopped_ends_bit_for_bit_as_one_left_alone(folder) -> None:
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == {
        "one": [0],
        "two": [0, 0],
        "killed before the update of step 2": [0, -9],
        "stopped by a signal in step 4": [75, 75],
        "killed while step 6 is saved": [-9, 0],
        "started with another learning rate": [2, 2],
        "killed before the model is in place": [-9, 0],
        "goes on to the end": [0, 0],
    }
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("two", "ended")]
    assert weights[0] == weights[1]
    assert losses_of(folder, "two") == losses_of(folder, "ended")


def test_a_warm_start_that_goes_on_with_other_settings_says_what_differs(folder) -> None:
    said = (folder / "output.txt").read_text()
    assert "warmstart.lr 0.01 -> 0.02. Choose another run.name for a new experiment; --accept-changes" in said


def test_a_warm_start_leaves_a_marked_model_and_no_checkpoints(folder) -> None:
    assert json.loads((folder / "ended" / MARKER).read_text())["settings"]["warmstart.steps"] == STEPS
    assert not (folder / "runs" / "ended-warmstart" / "checkpoints").exists()
    assert not list(folder.glob(".*unfinished"))
