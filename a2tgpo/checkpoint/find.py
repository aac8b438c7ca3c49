"""Find the weights that a path refers to, in a Hugging Face folder or in a checkpoint of a run."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from a2tgpo.checkpoint.best import BEST_FILE
from a2tgpo.checkpoint.folder import MARKER
from a2tgpo.io.errors import ConfigError

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A folder on disk that contains the weights of a model."""

    path: Path
    """A Hugging Face folder, or the folder `step_N` of a checkpoint."""
    is_hf: bool
    step: int
    """Number of updates that produced the weights, or 0 if that number is unknown."""

    @property
    def label(self) -> str:
        """The name under which reports show the model."""
        return self.path.name

    @property
    def identity(self) -> str:
        """The folder's path, followed by a digest that changes when a program writes other weights to the folder.

        The digest covers the names, sizes and modification times of a Hugging Face folder's weight files, or a
        checkpoint's `complete.json`.
        """
        digest = hashlib.blake2b(digest_size=8)
        if not self.is_hf:
            digest.update((self.path / MARKER).read_bytes())
        for file in sorted(self.path.glob("*.safetensors")) if self.is_hf else ():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return f"{self.path.resolve()} ({digest.hexdigest()})"


def find_model(path: str | Path, *, untrained: str | Path = "", key: str = "--checkpoint") -> SavedModel:
    """Return the weights that `path` refers to.

    Args:
        path: a Hugging Face folder or a checkpoint (`runs/NAME/checkpoints/step_N`). `.../checkpoints` refers to the
            newest complete checkpoint, and `.../checkpoints/best` to the checkpoint that best.json names.
        untrained: the Hugging Face folder to return if best.json names step 0, and the run has no checkpoint of it.
        key: the option with which the user gave `path`, for error messages.

    Raises:
        ConfigError: with a one-line message, if `path` refers to no weights.
    """
    path = Path(path)
    if path.name == "best" and not path.exists():
        return _best(path, untrained, key)
    if (path / "config.json").is_file():
        return SavedModel(path=path, is_hf=True, step=0)
    if (path / MARKER).is_file():
        return SavedModel(path=path, is_hf=False, step=_step_of(path))
    steps = [entry for entry in path.glob("step_*") if (entry / MARKER).is_file()] if path.is_dir() else []
    if steps:
        newest = max(steps, key=_step_of)
        return SavedModel(path=newest, is_hf=False, step=_step_of(newest))
    found = "does not exist" if not path.exists() else f"has neither config.json nor {MARKER}"
    raise ConfigError(
        f"{key}: {path} {found}; give a Hugging Face folder, a run's checkpoints/step_N or checkpoints/best"
    )


def _best(path: Path, untrained: str | Path, key: str) -> SavedModel:
    file = path.parent / BEST_FILE
    try:
        step = int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {file} ({error.strerror}), which names the best checkpoint; give a step_N"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ConfigError(f"{key}: {file} is damaged; give a step_N") from None
    own = path.parent / f"step_{step}"
    return find_model(own if step or own.exists() else untrained, key=key)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else 0
