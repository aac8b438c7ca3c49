"""The examples of a warm start, and the changes of them that a resumed warm start refuses."""

import datetime
import json
from pathlib import Path

import pytest
from chat_models import qwen_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config

from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.warmstart.examples import load_examples

CONFIG = "configs/quickstart_chat.yaml"
DATE = datetime.date(2026, 1, 31)
TOOL = """
class search:
    description = "Searches the notes."

    def __init__(self, config):
        pass

    def call(self, text):
        return ["nothing"]

    def close(self):
        pass
"""


@pytest.fixture
def examples(tmp_path):
    """Return a function that loads a model's examples in the chat protocol, with a user's tool."""
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    size = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), **size, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    record = {
        "question": "Where is Oslo?",
        "answers": ["Norway"],
        "turns": [
            {
                "text": "I search.",
                "calls": [{"name": "search", "arguments": {"text": "Oslo"}, "result": "a"}],
            },
            {"text": "\\boxed{Norway}"},
        ],
    }
    (tmp_path / "demonstrations.jsonl").write_text(json.dumps(record) + "\n")
    settings = [
        f"warmstart.source={tmp_path / 'model'}",
        f"warmstart.demonstrations={tmp_path / 'demonstrations.jsonl'}",
        "warmstart.batch_size=1",
    ]

    def examples(tool: str = TOOL, *, name: str = "before"):
        (tmp_path / f"{name}.py").write_text(tool)
        tools = f"tools.names=['{tmp_path}/{name}.py:search']"
        return load_examples(load_config(CONFIG, [*settings, tools]), date=DATE)

    return examples


def refused(before, now) -> str:
    with pytest.raises(ConfigError) as found:
        now.require_same(before.fingerprints, checkpoint=Path("step_3"), file="demonstrations.jsonl")
    return str(found.value)


def test_a_resumed_warm_start_refuses_a_changed_description_of_a_tool(examples):
    before = examples()
    described = examples(TOOL.replace("the notes", "all notes"), name="described")
    assert refused(before, described).startswith("warmstart: the prompts differ from those that step_3")
    answering = examples(TOOL.replace("nothing", "something"), name="answering")
    answering.require_same(before.fingerprints, checkpoint=Path("step_3"), file="demonstrations.jsonl")


def test_a_resumed_warm_start_refuses_other_demonstrations(examples, tmp_path):
    before, file = examples(), tmp_path / "demonstrations.jsonl"
    file.write_text(file.read_text().replace("Norway", "Sweden"))
    assert refused(before, examples()).startswith("warmstart.demonstrations: demonstrations.jsonl differs")
