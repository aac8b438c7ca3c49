"""A user's mistake gives one line that says what is wrong, where it is and what is allowed, and never a traceback."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from documented import documented
from preloaded.command import PYTHON
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from a2tgpo.checkpoint.folder import MARKER, STATE
from a2tgpo.model.hf_config import architecture_of, load_hf_config
from launch.train import main

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, str]:
    """Settings of a run in which a dry run finds no fault."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "model", "qwen3")
    question = {"id": "1", "question": "What is the capital of France?", "answers": ["Paris"]}
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({**question, "id": str(i)}) + "\n" for i in range(4))
        )
    (folder / "corpus.jsonl").write_text(
        json.dumps({"id": "1", "contents": '"France"\nIts capital is Paris.'}) + "\n"
    )
    (folder / "run.yaml").write_text("run: {name: bad-input, steps: 1}\n")
    return {
        "config": str(folder / "run.yaml"),
        "run.root": str(folder / "runs"),
        "model.path": str(folder / "model"),
        "model.dtype": "float32",
        "data.train": str(folder / "train.jsonl"),
        "data.test": str(folder / "test.jsonl"),
        "data.max_prompt_tokens": "2000",
        "rollout.max_response_tokens": "1000",
        "search.corpus": str(folder / "corpus.jsonl"),
        "rollout.prompts_per_step": "2",
        "update.prompts_per_minibatch": "2",
    }


def start(settings: dict[str, str], *, dry_run: bool = True) -> subprocess.CompletedProcess:
    settings = dict(settings)
    command = [
        PYTHON,
        "launch/train.py",
        "--config",
        settings.pop("config"),
        *["--dry-run"] * dry_run,
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [*command, *(f"{key}={value}" for key, value in settings.items())],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_dry_run_of_a_sound_configuration_prints_it(good):
    result = start(good)
    assert result.returncode == 0, result.stderr
    assert "files and layout are fine" in result.stdout and "fits in every phase" in result.stdout
    printed = yaml.safe_load(result.stdout)
    assert printed["rollout"]["prompts_per_step"] == 2 and printed["model"]["path"] == good["model.path"]


def test_a_dry_run_of_what_does_not_fit_says_so_in_one_line(good, monkeypatch, capsys):
    assert dry_run({**good, "rollout.kv_cache_gib": "90"}, monkeypatch) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: does not fit 8 x h100-80gb: ") and "rollout.kv_cache_gib=" in line
    assert "# planned for 8 x h100-80gb (cluster.gpu; this machine has no visible GPU)" in captured.out


def write(folder: Path, content: str | bytes, *, encoding: str = "utf-8") -> str:
    path = folder / "written"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def model_with(folder: Path, good: Path, change: Callable[[Path], object]) -> dict[str, str]:
    """Return a changed copy of the good model."""
    model = folder / "model"
    shutil.copytree(good, model)
    change(model)
    return {"model.path": str(model)}


def lose_the_tokenizer(model: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()


def set_sizes(model: Path, **sizes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))


def add_tokens(model: Path, count: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|more_{i}|>" for i in range(count)])
    tokenizer.save_pretrained(model)


def add_head(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    set_sizes(model, tie_word_embeddings=True)


BROKEN = {
    "unknown key": (lambda f: {"rollout.group_sise": "4"}, ["rollout.group_sise", "rollout.group_size"]),
    "bad value": (lambda f: {"rollout.group_size": "0"}, ["rollout.group_size", ">= 1"]),
    "missing config": (lambda f: {"config": str(f / "none.yaml")}, ["none.yaml"]),
    "missing model": (lambda f: {"model.path": str(f / "none")}, ["model.path", "none"]),
    "folder without a model": (lambda f: {"model.path": str(f)}, ["config.json"]),
    "missing corpus": (lambda f: {"search.corpus": str(f / "none")}, ["search.corpus", "none"]),
    "malformed corpus": (lambda f: {"search.corpus": write(f, '{"id": 1\n')}, ["line 1"]),
    "empty question set": (lambda f: {"data.train": write(f, "")}, ["data.train"]),
    "question without answer": (
        lambda f: {"data.train": write(f, '{"question": "why?", "answers": []}\n')},
        ["line 1", "answers"],
    ),
    "prompt past the budget": (
        lambda f: {"data.max_prompt_tokens": "3"},
        ["data.max_prompt_tokens", "tokens"],
    ),
    "server that is down": (
        lambda f: {
            "search.backend": "http",
            "search.url": "http://127.0.0.1:9/retrieve",
            "search.max_attempts": "1",
        },
        ["127.0.0.1:9"],
    ),
    "layout that the model's heads do not allow": (lambda f: {"parallel.tensor": "3"}, ["parallel.tensor"]),
    "name of several lines": (lambda f: {"run.name": "a\nb"}, ["run.name", "printable"]),
    "name too long for a folder": (lambda f: {"run.name": "x" * 300}, ["run.name", "at most 200"]),
    "name of too many bytes": (
        lambda f: {"run.name": "模" * 100},
        ["run.name", "at most 200 bytes in UTF-8"],
    ),
    "variable that is not set": (
        lambda f: {"run.root": "${A2TGPO_NOT_SET}/runs"},
        ["run.root is '${A2TGPO_NOT_SET}/runs', but $A2TGPO_NOT_SET is not set or empty"],
    ),
    "questions in UTF-16": (
        lambda f: {"data.train": write(f, '{"question": "q"}\n', encoding="utf-16")},
        ["written line 1: not UTF-8 but UTF-16"],
    ),
    "packed corpus cut short": (
        lambda f: {"search.corpus": write(f, gzip.compress(b'{"id": 1, "contents": "c"}\n')[:-4])},
        ["search.corpus", "damaged or cut short"],
    ),
    "more tokens than the model has positions": (
        lambda f: {"rollout.max_response_tokens": "3000"},
        ["is 5064; allowed: at most the 4096 positions of model.path"],
    ),
    "NUL in a path": (lambda f: {"data.train": "a\0b"}, ["data.train", "without NUL"]),
    "half a character": (lambda f: {"data.instructions": "\udcff"}, ["data.instructions", "UTF-8"]),
    "fewer questions than a step asks": (
        lambda f: {"rollout.prompts_per_step": "8"},
        ["rollout.prompts_per_step is 8", "data.train (4)"],
    ),
}
BROKEN_MODELS = {
    "weights cut short": (
        lambda m: os.truncate(m / "model.safetensors", 100_000),
        "model.safetensors is damaged",
    ),
    "no tokenizer": (lose_the_tokenizer, "has no tokenizer.json"),
    "damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "the tokenizer is damaged"),
    "tokenizer that is no text": (
        lambda m: (m / "tokenizer.json").write_bytes(b"\xff"),
        "the tokenizer is damaged",
    ),
    "tokenizer larger than the embedding": (
        lambda m: add_tokens(m, 100),
        "but the model's embedding has 512 rows (vocab_size); call resize_token_embeddings(",
    ),
    "head of its own where the config ties it": (
        add_head,
        "tie_word_embeddings true, but lm_head.weight differs from model.embed_tokens.weight; set",
    ),
    "index beside weights that it does not list": (
        lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}'),
        "model.safetensors.index.json, which does not list it; remove the wrong one",
    ),
    "rope scaling by the length of the sequence": (
        lambda m: set_sizes(m, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope scaling 'dynamic', whose frequencies change",
    ),
    "key-value heads": (
        lambda m: set_sizes(m, num_key_value_heads=3),
        "a divisor of num_attention_heads (4)",
    ),
    "no heads": (lambda m: set_sizes(m, num_attention_heads=0), "num_attention_heads 0; allowed"),
    "rotary base": (
        lambda m: set_sizes(m, rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        "rope_theta 'x'; allowed: a number",
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_one_line_tells_what_is_wrong(good, tmp_path, mistake, monkeypatch, capsys):
    change, expected = BROKEN[mistake]
    line = refusal({**good, **change(tmp_path)}, monkeypatch, capsys)
    for part in expected:
        assert part in line


@pytest.mark.parametrize("mistake", BROKEN_MODELS)
def test_one_line_tells_what_is_wrong_with_the_model(good, tmp_path, mistake, monkeypatch, capsys):
    change, expected = BROKEN_MODELS[mistake]
    model = model_with(tmp_path, Path(good["model.path"]), change)
    assert expected in refusal({**good, **model}, monkeypatch, capsys)


@pytest.mark.parametrize("resume", ["", "none-such", "/tmp"])
def test_a_dry_run_looks_whether_there_is_a_checkpoint_to_go_on_from(good, resume, monkeypatch, capsys):
    line = refusal(good, monkeypatch, capsys, "--resume", resume)
    assert f"--resume is {resume!r}; allowed: auto, none, or a checkpoint's folder" in line


@pytest.mark.parametrize("resume", ["auto", "named"])
def test_a_dry_run_compares_the_checkpoint_to_go_on_from_with_the_model(
    good, tmp_path, resume, monkeypatch, capsys
):
    checkpoint = tmp_path / "bad-input" / "checkpoints" / "step_12"
    for folder in (
        checkpoint,
        checkpoint.with_name("step_9"),
    ):  # an older checkpoint is not read if the newest checkpoint is readable
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("{}")
    model = architecture_of(load_hf_config(good["model.path"]))
    record = {"schedule": {"steps_done": 12}, "layout": {"tp": 8}, "state": {"step": 12}, "model": model}
    (checkpoint / STATE).write_text(json.dumps(record))
    settings = {**good, "run.root": str(tmp_path)}
    options = ("--resume", resume if resume == "auto" else str(checkpoint))
    assert dry_run(settings, monkeypatch, *options) == 0  # another layout can be loaded
    record["model"] = {**model, "num_hidden_layers": 7}
    (checkpoint / STATE).write_text(json.dumps(record))
    capsys.readouterr()
    line = refusal(settings, monkeypatch, capsys, *options)
    assert line.startswith(f"error: --resume: {checkpoint} does not fit the model at model.path")
    assert f"num_hidden_layers 7 (here {model['num_hidden_layers']})" in line
    (checkpoint / STATE).write_text("{")
    if resume == "auto":  # the start would continue from an older checkpoint
        assert dry_run(settings, monkeypatch, *options) == 0
    else:
        assert "was not written by this program" in refusal(settings, monkeypatch, capsys, *options)
    (checkpoint / STATE).unlink()
    assert dry_run(settings, monkeypatch, *options) == (0 if resume == "auto" else 2)


def refusal(settings: dict[str, str], monkeypatch, capsys, *options: str) -> str:
    """Return the one line that a dry run prints."""
    assert dry_run(settings, monkeypatch, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def dry_run(settings: dict[str, str], monkeypatch, *options: str) -> int:
    """Return the exit code of a dry run in this process, in which an uncaught exception would be a traceback."""
    settings = dict(settings)
    arguments = ["--config", settings.pop("config"), "--dry-run", *options]
    arguments += [f"{key}={value}" for key, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return main()


def test_a_checkpoint_of_a_model_of_another_size_is_one_line(good, tmp_path):
    shutil.copytree(good["model.path"], tmp_path / "other")
    set_sizes(tmp_path / "other", intermediate_size=256)
    config = AutoConfig.from_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    imported = convert(good, "hf-to-megatron", good["model.path"], tmp_path / "checkpoints")
    assert imported.returncode == 0, imported.stderr
    settings = {**good, "model.path": str(tmp_path / "other")}
    done = convert(settings, "megatron-to-hf", tmp_path / "checkpoints" / "step_0", tmp_path / "out")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        done.returncode == 2
        and len(errors) == 1
        and "it was saved from a model with intermediate_size 128 (here 256); give" in errors[0]
    ), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def convert(
    settings: dict[str, str], direction: str, source: str | Path, out: Path
) -> subprocess.CompletedProcess:
    settings = dict(settings)
    command = [PYTHON, "tools/convert.py", direction, "--in", str(source), "--out", str(out)]
    command += ["--config", settings.pop("config"), *(f"{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"parallel.tensor": "2"}, "does not divide"),
        ({"rollout.kv_cache_gib": "0.0001"}, "rollout.kv_cache_gib"),
    ],
    ids=["layout that does not divide the world", "cache that holds no sequence"],
)
def test_what_only_a_started_run_can_find_is_one_line_too(good, change, expected):
    result = start({**good, **change}, dry_run=False)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0] and "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory can be recorded")
def test_the_documented_memory_snapshot_is_refused_without_a_gpu(tmp_path):
    command = documented("profiling.md", "profile.memory=")
    result = subprocess.run(
        ["bash", "-c", f"{command} run.root={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line == "error: profile.memory is ['update']; allowed: [] here, since torch sees no GPU"
    assert line in (ROOT / "docs/profiling.md").read_text() and not any(tmp_path.iterdir())
