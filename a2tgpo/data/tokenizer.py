"""Loading the tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from a2tgpo.config.check import ConfigError
from a2tgpo.error_line import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str, *, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer in folder `path`; nothing is looked up on a network.

    Args:
        key: the configuration key that names the folder, for error messages.

    Raises:
        ConfigError: one line, if there is none or it is damaged.
    """
    from transformers import AutoTokenizer

    # Without any of them transformers makes up an empty tokenizer for some architectures.
    if not any((Path(path) / name).is_file() for name in FILES):
        raise ConfigError(f"{key} {path!r} holds no {FILES[0]}; copy the tokenizer's files there")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever a bad file leads to
        raise ConfigError(
            f"{key} {path!r}: the tokenizer is damaged ({first_line(error):.120}); fetch its files again"
        ) from error
