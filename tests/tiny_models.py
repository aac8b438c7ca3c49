"""Build tiny models and their tokenizers in seconds, and teach one of them to play search rollouts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Peru": "Lima",
}
ASK = "<think> I need a fact. </think> <search> {} </search>"
ANSWER = " <think> now I know. </think> <answer> \\boxed{{{}}} </answer>"
SCRIPTS: dict[str, list[str]] = {
    **{
        f"capital of {country}?": [ASK.format(f"capital of {country}"), ANSWER.format(city)]
        for country, city in CAPITALS.items()
    },
    **{
        f"ruler of {country}?": [
            ASK.format(f"capital of {country}"),
            " " + ASK.format(f"ruler of {city}"),
            ANSWER.format(f"King of {city}"),
        ]
        for country, city in list(CAPITALS.items())[:3]
    },
    "loop?": [" <search> again </search>"] * 4,
    "empty?": ["<think> what? </think> <search> </search>"],
    "unopened?": ["<think> what? </think> lost </search>"],
    "nested?": ["<think> what? </think> <search> one <search> two </search>", ANSWER.format("two")],
    "babble?": ["<think>" + " la" * 60],
    "silent?": ["<think> what? </think> I do not know.<|im_end|>"],
}
"""Maps each question to the texts that the taught model writes, turn by turn. No observation follows the last
turn.
"""


def build_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the words of `SCRIPTS` and at most `vocab_size` ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [question + "".join(turns) for question, turns in SCRIPTS.items()] * 3
    corpus += [
        " <result>\nDoc 1 (Title: capital of) It is known.\n</result> The search failed: user assistant\n"
    ] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def build_model(
    architecture: str,
    *,
    vocab_size: int = 512,
    tied: bool = False,
    seed: int = 0,
    num_layers: int = 2,
    eos_token_id: int = 2,
    sharpness: float = 4.0,
) -> PreTrainedModel:
    """Return a random float32 model with 64 hidden channels, 2 KV heads, and 4 heads of 32 channels, the smallest
    size for vLLM's attention on CPUs.

    `sharpness` scales the matrices, so that the distributions are not all uniform.
    """
    torch.manual_seed(seed)
    config_class, model_class = ARCHITECTURES[architecture]
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=128 if architecture == "qwen2" else 64,  # Qwen2's head size is hidden / heads
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        tie_word_embeddings=tied,
    )
    if architecture != "qwen2":
        sizes["head_dim"] = 32
    if architecture == "mistral":
        sizes["sliding_window"] = None
    if architecture == "qwen3_moe":
        sizes |= dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    model = model_class(config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model


def checkpoint_tensors(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameters (or gradients) of a transformers model with the names and shapes of a checkpoint.

    Only experts differ, because transformers fuses them: gate_up_proj [experts, 2 x channels, hidden].
    """
    tensors = {}
    for name, tensor in named.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = tensor
            continue
        stem, _, kind = name.rpartition(".")
        for number, expert in enumerate(tensor):
            if kind == "down_proj":
                tensors[f"{stem}.{number}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                tensors[f"{stem}.{number}.gate_proj.weight"] = gate
                tensors[f"{stem}.{number}.up_proj.weight"] = up
    return tensors


def save_tiny(
    out: str | Path, architecture: str, *, vocab_size: int = 512, tied: bool = False, seed: int = 0
) -> str:
    """Write a random model and its tokenizer to `out`, and return `out` as text."""
    tokenizer = build_tokenizer(min(vocab_size, 512))
    model = build_model(
        architecture, vocab_size=vocab_size, tied=tied, seed=seed, eos_token_id=tokenizer.eos_token_id
    )
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return str(out)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def save_taught(out: str | Path, *, vocab_size: int = 528, steps: int = 140) -> str:
    """Write a Qwen3 model that plays `SCRIPTS` by heart, whatever the observations are. Return `out`.

    The model's vocabulary is larger than its tokenizer's. On one thread the result is deterministic, and takes some 8
    seconds.
    """
    tokenizer = build_tokenizer()
    model = build_model(
        "qwen3", vocab_size=vocab_size, eos_token_id=tokenizer.eos_token_id, sharpness=1.0, seed=1
    )
    tokens, targets = _lessons(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    for step in range(steps):
        variant = slice(step % 2, None, 2)
        logits = model(tokens[variant]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[variant, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.03, f"the tiny model did not learn its scripts: loss {loss.item():.3f}"
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return str(out)


def teach_more(
    folder: str, question: str, turns: list[str], observation: str, *, max_steps: int = 300
) -> PreTrainedModel:
    """Return the model in `folder` after further lessons in one script, with the same tokenizer. This takes some 2
    seconds.

    Args:
        observation: text that follows every turn except the last.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = prompt_ids(tokenizer, question)
    wanted = [-100] * len(ids)
    for number, text in enumerate(turns):
        seen = encode(observation) if number + 1 < len(turns) else []
        ids += encode(text) + seen
        wanted += encode(text) + [-100] * len(seen)
    tokens, targets = torch.tensor([ids]), torch.tensor([wanted])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(max_steps):
        loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], targets[0, 1:])
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, f"the tiny model did not learn one more script: loss {loss.item():.3f}"
    return model


def _lessons(tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded token ids of every script with made-up observations, and targets (-100 at tokens that are not the
    policy's).
    """
    rows: list[tuple[list[int], list[int]]] = []
    for question, turns in SCRIPTS.items():
        for observation in (
            " <result>\nDoc 1 (Title: {0}) {0} is known.\n</result>",
            " <result>\nThe search failed: no\n</result>",
        ):
            ids = prompt_ids(tokenizer, question)
            wanted = [-100] * len(ids)
            for number, text in enumerate(turns):
                piece = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                wanted += piece
                if number + 1 < len(turns):
                    query = text.rpartition("<search>")[2].removesuffix("</search>").strip()
                    answer = tokenizer(observation.format(query), add_special_tokens=False)["input_ids"]
                    ids += answer
                    wanted += [-100] * len(answer)
            rows.append((ids, wanted))
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    targets = torch.tensor([wanted + [-100] * (longest - len(wanted)) for _, wanted in rows])
    return tokens, targets
