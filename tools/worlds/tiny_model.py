"""Build a tiny Qwen3 or Qwen3-MoE model and its tokenizer. Two CPU cores train the model in minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2tgpo.io.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGS = (
    "<think>",
    " </think>",
    " <search>",
    " </search>",
    " <result>\n",
    "\n</result>",
    " <answer>",
    " \\boxed{",
    " </answer>",
    "Doc 1 (Title: ",
    ") ",
)
"""Texts of the protocol that are one token each."""
CHAT_SPECIAL = (*SPECIAL, "<|end|>")
CHAT_PROTOCOL_TEMPLATE = """\
{%- for tool in tools or [] %}{{ '<|system|>' + tool.function.name + '<|end|>' }}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|user|>' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|end|>' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
"""A chat template with tool calls. It has the structure of Qwen's template, but describes a tool only by its name."""
CHAT_TAGS = (
    "<think>",
    " </think>",
    '\n<tool_call>\n{"name": "search", "arguments": {"query": "',
    '"}}\n</tool_call>',
    "<tool_response>\n",
    "\n</tool_response>",
    " \\boxed{",
    "Doc 1 (Title: ",
    ") ",
)
"""The same as `TAGS`, but for the chat protocol."""
# Split a space from a capital letter after it, so that a name has the same tokens with and without a space before it.
WORDS = r" ?[a-z]+| ?[^\sA-Za-z]|[A-Z][a-z]*|\s"
VOCAB_SIZE = 480
ROPE_THETA = 10_000.0
EMBEDDING_STD = 0.06


def build_tokenizer(texts: Iterator[str], *, protocol: str = "tags") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most `VOCAB_SIZE` ids on `texts`.

    The vocabulary is so small that names are split into pieces that other names also contain.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special, tags, template = (
        (SPECIAL, TAGS, CHAT_TEMPLATE)
        if protocol == "tags"
        else (CHAT_SPECIAL, CHAT_TAGS, CHAT_PROTOCOL_TEMPLATE)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(tags),
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, *, seed: int, num_experts: int = 0) -> PreTrainedModel:
    """Build a model of two layers: a Qwen3 with a third of a million parameters, or a Qwen3-MoE.

    All parameters are random, except those that `place_induction_heads` sets.

    Args:
        num_experts: number of experts per layer, at least 2. Each token uses two of them, which together have as many
            channels as the dense model's MLP. 0: no experts.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest value that the engine's attention supports on a CPU
        initializer_range=0.04,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: PreTrainedModel
    if num_experts:
        experts: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_experts=num_experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    with torch.no_grad():
        place_induction_heads(model)
    return model


def place_induction_heads(model: PreTrainedModel) -> None:
    """Initialise the first heads of both layers, so that they form an induction circuit (Olsson et al. 2022).

    The head in layer 0 attends to the previous token. The head in layer 1 attends to the positions directly after
    earlier occurrences of the current token, and copies the tokens at these positions. A random model of this size
    needs over ten times as long to learn to copy names. Call this function with gradients disabled.
    """
    import torch

    width, size = model.config.hidden_size, model.config.head_dim
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    frequency = ROPE_THETA ** (-torch.arange(size // 2) / (size // 2))

    # Initialise the other heads and the MLPs with small values, so that their noise does not exceed these two heads'
    # signal.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.1
        outputs = layer.mlp.experts.down_proj if hasattr(layer.mlp, "experts") else layer.mlp.down_proj.weight
        outputs *= 0.1
    # Give every embedding the same constant coordinate, so that queries and keys have a part that depends only on
    # position. The tied output layer adds this coordinate equally to all logits, which changes no probability.
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, EMBEDDING_STD)
    embedding[:, 0] = 6 * EMBEDDING_STD

    # In the fast rotations, turn the query back by one position, so that it matches the key of the previous position.
    fast = torch.zeros(size)
    fast[:5] = 1.0
    back = torch.cat([torch.cos(frequency) * fast[: size // 2], -torch.sin(frequency) * fast[: size // 2]])
    for projection, constant in ((first.k_proj, fast), (first.q_proj, back)):
        projection.weight[:size] *= 0.1
        projection.weight[:size, 0] = 0.5 * constant

    # Divide a token's content into three orthogonal subspaces. Layer 0 reads the first subspace and writes to the
    # second. Layer 1 copies the third.
    basis = torch.zeros(width, width)
    basis[1:, 1:] = torch.linalg.qr(torch.randn(width - 1, width - 1))[0]
    read, write, copied = basis[1:].split(size)[:3]  # [size, width] each, without the constant coordinate
    # Compare contents in the slow rotations, because these hardly change over a few hundred positions.
    slow = (frequency < 0.006).nonzero()[:, 0]
    slow = torch.cat([slow, slow + size // 2])
    compare = torch.linalg.qr(torch.randn(size, len(slow)))[0].T
    for projection, content in ((second.q_proj, compare @ read), (second.k_proj, compare @ write)):
        projection.weight[:size] *= 0.1
        projection.weight[slow] += content
    first.v_proj.weight[:size] = read
    first.o_proj.weight[:, :size] = 0.15 * write.T
    second.v_proj.weight[:size] = copied
    second.o_proj.weight[:, :size] = 0.3 * copied.T
    for attention, gain in ((first, 2.3), (second, 2.0)):
        attention.q_norm.weight.fill_(gain)
        attention.k_norm.weight.fill_(gain)


def texts_of(data: Path) -> Iterator[str]:
    """Yield the texts of a data set's demonstrations: the questions, the policy's texts and the observations.

    Raises:
        ConfigError: with a one-line message, if the demonstrations are missing, malformed or empty.
    """
    from a2tgpo.data.demonstrations import load_demonstrations

    path = data / "demonstrations.jsonl"
    if not path.is_file():
        raise ConfigError(f"--data {data} has no demonstrations.jsonl; create it with tools/prepare_data.py")
    for demonstration in load_demonstrations(str(path), key="--data"):
        yield demonstration.question.question
        for text, observation in demonstration.turns:
            yield text + (observation or "")
