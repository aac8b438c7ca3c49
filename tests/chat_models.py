"""Tokenizers with the added tokens of known model families, and templates with the structure of these families'
templates.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QWEN = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system else '') + 'Functions at hand:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\nA call is <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.<|im_end|>\n' }}
{%- elif system %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + THOUGHT + (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if not loop.first or m.content else '' }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\nHEADER' }}
{%- endif %}
"""
"""A template with the structure of Qwen2.5's and Qwen3's. A turn may have several calls. One user message has all
results.
"""

LLAMA = """\
{{- '<|begin_of_text|>' -}}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
<|start_header_id|>system<|end_header_id|>

{{ system }}
{%- if tools %}
Answer with {"name": NAME, "parameters": OBJECT} to call one of:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor -%}
{%- endif -%}
<|eot_id|>
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- elif m.role == 'assistant' -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call in a turn') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
"""A template with the structure of Llama 3.1's. A turn has at most one call, which is plain JSON. A result is a JSON
text.
"""


PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The rule by which both families split texts. Line breaks belong to the same piece as the punctuation before
them.
"""


def qwen_template(*, header: str = "", thought: str = "''") -> str:
    """Return the template with `header` after the generation header, and `thought` before the content of an
    assistant.
    """
    return QWEN.replace("HEADER", header.replace("\n", "\\n")).replace("THOUGHT", thought)


def build_chat_tokenizer(
    template: str, special: list[str], added: list[str], *, eos: str
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer. The `special` tokens are marked as special, and the `added` tokens
    are not.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = 'system user assistant {"name": "search", "arguments": {"query": "capital"}} name parameters'
    texts = [words, template, "\n</tool_response>\n", "a.\n", "a?\n\n", '"}\n', "the answer is \\boxed{}"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=special[0], chat_template=template
    )


def qwen_tokenizer(*, has_response_tags: bool = True, **template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Qwen3's or, without the tokens of responses and thoughts, like Qwen2.5's."""
    added = ["<tool_call>", "</tool_call>"]
    if has_response_tags:
        added += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return build_chat_tokenizer(qwen_template(**template), special, added, eos="<|im_end|>")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    special += ["<|eom_id|>", "<|python_tag|>"]
    return build_chat_tokenizer(LLAMA, special, [], eos="<|eot_id|>")


def schema(name: str, /, **properties: str) -> dict[str, Any]:
    """Return the description of a tool. `properties` maps each parameter to its type. All parameters are required."""
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": parameters},
    }


SEARCH = schema("search", query="string")
PLACE = schema("place", name="string", limit="integer")
