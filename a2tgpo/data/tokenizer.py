"""Load the tokenizer in a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from a2tgpo.io.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str, *, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load the tokenizer in folder `path`, without network access.

    If tokenizer.json exists, the class named in tokenizer_config.json is ignored, because some classes in
    transformers 5 replace the file's rules with their own. For example, the Llama models distilled from R1 name
    LlamaTokenizerFast, which would remove all spaces from their texts.

    Args:
        key: the configuration key that names the folder, for error messages.

    Raises:
        ConfigError: with a one-line message, if the folder has no intact tokenizer, or if the model has no embedding
            for one of the tokenizer's ids.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without these files, transformers creates an empty tokenizer for some architectures.
    if not any((Path(path) / name).is_file() for name in FILES):
        raise ConfigError(f"{key} {path!r} has no {FILES[0]}; copy the tokenizer's files there")
    is_whole = (Path(path) / FILES[0]).is_file()
    try:
        tokenizer = (PreTrainedTokenizerFast if is_whole else AutoTokenizer).from_pretrained(
            path, local_files_only=True
        )
    except Exception as error:  # transformers may raise any type of exception for a bad file
        raise ConfigError(
            f"{key} {path!r}: the tokenizer is damaged ({first_line(error):.120}); fetch its files again"
        ) from error
    _require_embedded(tokenizer, path, key)
    return tokenizer


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id of `tokenizer` plus one. Smaller ids may be unused."""
    return 1 + max(tokenizer.get_vocab().values())


def _require_embedded(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> None:
    """Raise `ConfigError` if the tokenizer has ids for which the model has no embedding."""
    try:
        rows = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # config.json is missing or malformed; the code that loads the model reports this
    size = num_token_ids(tokenizer)
    if isinstance(rows, int) and size > rows:
        token = tokenizer.convert_ids_to_tokens(size - 1)
        raise ConfigError(
            f"{key} {path!r}: the tokenizer knows id {size - 1} ({token!r:.40}), but the model's embedding has "
            f"{rows} rows (vocab_size); call resize_token_embeddings({size}) on the model and save it, or "
            "remove the added tokens from the tokenizer"
        )
