"""Loading the tokenizer in a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from a2tgpo.config.check import ConfigError
from a2tgpo.error_line import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str, *, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer in folder `path`; nothing is looked up on a network.

    It splits texts as tokenizer.json says, where there is one. The class that tokenizer_config.json names has no say:
    in transformers 5 some classes put rules of their own in place of the file's, and several families name a wrong
    one. The R1 distillates of Llama name LlamaTokenizerFast, which would take all spaces out of their texts.

    Args:
        key: the configuration key that names the folder, for error messages.

    Raises:
        ConfigError: one line, if there is none, it is damaged, or it knows ids that the model has no embedding for.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without any of them transformers makes up an empty tokenizer for some architectures.
    if not any((Path(path) / name).is_file() for name in FILES):
        raise ConfigError(f"{key} {path!r} holds no {FILES[0]}; copy the tokenizer's files there")
    is_whole = (Path(path) / FILES[0]).is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if is_whole else AutoTokenizer).from_pretrained(
            path, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever a bad file leads to
        raise ConfigError(
            f"{key} {path!r}: the tokenizer is damaged ({first_line(error):.120}); fetch its files again"
        ) from error
    _require_embedded(tokenizer, path, key)
    return tokenizer


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that `tokenizer` can give; ids below it may be unused."""
    return 1 + max(tokenizer.get_vocab().values())


def _require_embedded(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> None:
    """Refuse a tokenizer larger than the model beside it, whose padded embedding would serve such ids with zeros."""
    try:
        rows = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no model here, or a malformed one, which is told where it is read
    size = num_token_ids(tokenizer)
    if isinstance(rows, int) and size > rows:
        token = tokenizer.convert_ids_to_tokens(size - 1)
        raise ConfigError(
            f"{key} {path!r}: the tokenizer knows id {size - 1} ({token!r:.40}), but the model's embedding has "
            f"{rows} rows (vocab_size); call resize_token_embeddings({size}) on the model and save it, or take the "
            "added tokens out of the tokenizer"
        )
