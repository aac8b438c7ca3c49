"""Find the weights that a path refers to: a Hugging Face folder, or a checkpoint of a run."""

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
    """Weights on disk."""

    path: Path
    """A Hugging Face folder, or a checkpoint's `step_N`."""
    is_hf: bool
    step: int
    """Number of updates; 0 if unknown."""

    @property
    def label(self) -> str:
        """A name for reports."""
        return self.path.name

    @property
    def identity(self) -> str:
        """The folder's path and a digest that changes when other weights are written to the folder.

        The digest is computed without reading the weights.
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
        path: a Hugging Face folder; a checkpoint (`runs/NAME/checkpoints/step_N`); `.../checkpoints/best`, which
            best.json resolves; or a folder of checkpoints, for the newest complete one.
        untrained: the Hugging Face folder used if the best step is 0.
        key: the option that names `path`, for error messages.

    Raises:
        ConfigError: one line; `path` is none of these.
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
    return find_model(path.parent / f"step_{step}" if step else untrained, key=key)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else 0
