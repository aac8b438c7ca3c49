"""The parts of a training method. Each part is a module of this package or a file of the user."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a2tgpo.io.errors import ConfigError, one_of, require
from a2tgpo.io.user_code import fault_line, is_user_code, load_user_code, user_file


@dataclass(frozen=True, kw_only=True)
class MethodPart:
    """A setting whose value names a function: `NAME` of a module, or `path/to/file.py:function`."""

    key: str
    """The setting."""
    package: str
    """Package whose module names are allowed values of the setting."""
    function: str
    """Name of the function that each module of the package defines."""
    arguments: tuple[str, ...]
    """The function's positional arguments, for messages."""
    keywords: tuple[str, ...] = ()
    """The function's keyword arguments."""

    def names(self) -> list[str]:
        """Return the names of the modules in the package."""
        # List the modules without importing them.
        package = importlib.import_module(self.package)
        return sorted(module.name for module in pkgutil.iter_modules(package.__path__))

    def require_known(self, spec: str, *others: str) -> None:
        """Raise `ConfigError` unless `spec` names a module, one of `others`, or a file of the user."""
        if not is_user_code(spec):
            names = [*others, *self.names()]
            rule = one_of([*names, f"path/to/file.py:{self.function}"], spec)
            require(spec in names, self.key, spec, rule)

    def load(self, spec: str) -> Callable[..., Any]:
        """Return the function that `spec` names.

        If a function of the user raises an exception, the returned function raises a `ConfigError` that names the
        line of the user's file.

        Raises:
            ConfigError: with a one-line message, if the user's function cannot be loaded or has another signature.
        """
        if not is_user_code(spec):
            found: Callable[..., Any] = getattr(
                importlib.import_module(f"{self.package}.{spec}"), self.function
            )
            return found
        path, _ = user_file(spec, self.key)
        function = load_user_code(spec, self.key)
        self._require_signature(function, spec)
        return self._reporting(function, spec, path)

    def _require_signature(self, function: Any, spec: str) -> None:
        wanted = ", ".join((*self.arguments, *(("*", *self.keywords) if self.keywords else ())))
        rule = f"a function with the arguments ({wanted}) (docs/methods.md)"
        require(callable(function), self.key, spec, rule)
        try:
            inspect.signature(function).bind(*self.arguments, **dict.fromkeys(self.keywords))
        except TypeError as error:
            raise ConfigError(f"{self.key} is {spec!r}; allowed: {rule}, but {error}") from None
        except ValueError:  # a function without a readable signature
            pass

    def _reporting(self, function: Callable[..., Any], spec: str, path: Path) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return function(*arguments, **keywords)
            except Exception as error:
                raise ConfigError(
                    f"{self.key}: {spec} failed: {fault_line(error, path)}; mend the file"
                ) from error

        return call


ADVANTAGE = MethodPart(
    key="algorithm.advantage",
    package="a2tgpo.advantage.methods",
    function="advantages",
    arguments=("table", "config"),
    keywords=("dp_group",),
)
OBJECTIVE = MethodPart(
    key="algorithm.objective",
    package="a2tgpo.loss.objectives",
    function="token_losses",
    arguments=("logprobs", "inputs", "config"),
)
NO_CREDIT = "none"
"""Value of `algorithm.token_credit` if the advantages of turns are not changed."""
TOKEN_CREDIT = MethodPart(
    key="algorithm.token_credit",
    package="a2tgpo.loss.credits",
    function="token_credit",
    arguments=("logprobs", "inputs", "config"),
)
