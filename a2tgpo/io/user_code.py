"""Load a user's function or class, which a setting names as `path/to/file.py:name`.

The file runs with the rights of the trainer. Its path must therefore come from the configuration or the command line,
and never from a question set or a checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from a2tgpo.io.errors import ConfigError, first_line, one_of

_FORM = "path/to/file.py:name"
_MODULE = "a2tgpo_user_code_"
"""Prefix of the names under which the modules are registered."""


def is_user_code(spec: str) -> bool:
    """Return whether `spec` names a user's file and not a part of this package."""
    return ".py" in spec or "/" in spec


def user_file(spec: str, key: str) -> tuple[Path, str]:
    """Return the file and the name in `spec`.

    Args:
        spec: `path/to/file.py:name`; a relative path starts at the current folder.
        key: the setting that has this value, for messages.

    Raises:
        ConfigError: with a one-line message, if `spec` has another form or the file does not exist.
    """
    place, _, name = spec.rpartition(":")
    try:
        path = Path(place).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # for example, there is no such user, or the path is too long
        raise ConfigError(f"{key} is {spec!r:.200}, which cannot be read: {first_line(error):.80}") from None
    if path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"{key} is {spec!r}; allowed: {_FORM}")
    if not is_file:
        raise ConfigError(f"{key} is {spec!r}, but there is no file {path}; give the path of a Python file")
    return path, name


def load_user_code(spec: str, key: str) -> Any:
    """Run the file in `spec`, and return the object with the name in `spec`.

    All specs with the same file share one module, so the file runs once in each process.

    Raises:
        ConfigError: with a one-line message, if `spec` has another form, or if the name cannot be loaded from the
            file.
    """
    path, name = user_file(spec, key)
    module = _module(path, key)
    if not hasattr(module, name):
        known = [other for other in vars(module) if not other.startswith("_")]
        raise ConfigError(f"{key} is {spec!r}, but {path} defines no {name}; defined: {one_of(known, name)}")
    return getattr(module, name)


def fault_line(error: BaseException, path: Path) -> str:
    """Return one line with the exception and its place: the last frame in `path`, or else the last of all frames."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == path.absolute()] or frames
    kind, text = type(error).__name__, first_line(error)
    message = kind if text == kind else f"{kind}: {text}"
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        return f"{path.name}:{error.lineno}: {kind}: {error.msg}"
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}: {message}" if own else message


def digest(path: Path) -> str:
    """Return a hexadecimal digest of the content of `path`."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _module(path: Path, key: str) -> ModuleType:
    place = str(path.absolute())
    name = _MODULE + hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, place)
    assert found is not None and found.loader is not None, place
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # `@dataclass` looks up the module of a class here
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{key}: cannot load {path}: {fault_line(error, path)}; mend the file") from None
    return module
