"""A tokenizer splits texts by the rules of its file, whatever the other files say."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from a2tgpo.data.literal_text import LiteralEncoder
from a2tgpo.data.template import PromptTemplate
from a2tgpo.data.tokenizer import load_tokenizer

TEXT = "Hello world,  a <think> capital\n\nof 12345 é 北京 " * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "ll"])}, merges=[("l", "l")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return core


def write(folder, core, *, model_type="llama", **settings):
    """Write a folder like a checkpoint's with this tokenizer, and return its path."""
    core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 512}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "named", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", None]
)
def test_the_class_that_a_folder_names_changes_no_token(tmp_path, named, model_type):
    """The R1 distillates of Llama name LlamaTokenizerFast, although their tokenizer is byte-level."""
    core = byte_level()
    settings = {} if named is None else {"tokenizer_class": named}
    tokenizer = write(tmp_path, core, model_type=model_type, **settings)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == core.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == core.token_to_id("<|im_end|>")


def test_limits_and_padding_that_were_saved_in_the_file_change_no_token(tmp_path):
    core = byte_level()
    expected = core.encode(TEXT, add_special_tokens=False).ids
    core.enable_truncation(16)
    core.enable_padding(length=32, pad_id=3)
    tokenizer = write(tmp_path, core, model_max_length=16, padding_side="left")
    encoder = LiteralEncoder(tokenizer)
    assert encoder.encode(TEXT) == expected
    assert encoder.encode_parts(["Hello", TEXT]) == [encoder.encode("Hello"), expected]


def test_what_the_tokenizers_file_adds_to_every_text_is_in_no_part_of_a_sequence(tmp_path):
    core = byte_level()
    begin, end = (
        ("<|im_start|>", core.token_to_id("<|im_start|>")),
        ("<|im_end|>", core.token_to_id("<|im_end|>")),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[begin, end]
    )
    tokenizer = write(tmp_path, core, add_bos_token=True, add_eos_token=True, bos_token="<|im_start|>")
    assert tokenizer("x")["input_ids"][0] == begin[1], "as they are meant to be tried here"
    assert LiteralEncoder(tokenizer).encode("x") == [core.token_to_id("x")]
    prompt = PromptTemplate(tokenizer, "").render("Why?")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
