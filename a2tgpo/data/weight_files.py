"""List the files that hold a checkpoint's weights, for both the trainer and the engine."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from a2tgpo.io.errors import ConfigError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: str) -> dict[str, Path]:
    """Return the safetensors files of the checkpoint in folder `path`, as a map from file name to path.

    If the folder has an index, return the files that the index lists. Otherwise return model.safetensors if it
    exists, else all *.safetensors files. Other files are ignored, for example an adapter.

    Raises:
        ConfigError: with a one-line message, if the folder has no such files, or if the index is malformed or does
            not match the files.
    """
    folder = Path(path)
    index = folder / INDEX_FILE
    if index.is_file():
        names = _names_in(index, path)
        if SINGLE_FILE not in names and (folder / SINGLE_FILE).is_file():
            raise ConfigError(
                f"model.path {path!r} has both {SINGLE_FILE} and {INDEX_FILE}, which does not list it; remove "
                "the wrong one"
            )
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ConfigError(f"model.path {path!r} has no *.safetensors; convert the checkpoint to safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"model.path {path!r}: {name} is listed in {INDEX_FILE} but missing; fetch it again"
            )
    return {name: folder / name for name in names}


def weight_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the `weight_files` of folder `path`, by name. Only file headers are read.

    Raises:
        ConfigError: with a one-line message, if `weight_files` raises it, if a file is damaged, or if two files hold
            the same tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    holder: dict[str, str] = {}
    for file_name, file in weight_files(path).items():
        try:
            # Opening a file fails if the file's size contradicts its header.
            with safe_open(file, framework="np") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.path {path!r}: {file_name} is damaged: {error}; fetch it again"
            ) from error
        for name in found:
            if name in holder:
                raise ConfigError(
                    f"model.path {path!r}: tensor {name} is in both {holder[name]} and {file_name}; remove the "
                    "wrong file"
                )
            holder[name] = file_name
        shapes |= found
    return shapes


def _names_in(index: Path, path: str) -> list[str]:
    """Return the sorted names of all files that an index lists."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{index} is not valid JSON: {error}") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ConfigError(f"model.path {path!r}: {index.name} lists no files by weight; fetch it again")
    return sorted(set(listed.values()))
