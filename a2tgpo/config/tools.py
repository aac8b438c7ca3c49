"""Settings of the policy's tools, and of the calculator."""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

from a2tgpo.io.errors import ConfigError, one_of, require
from a2tgpo.io.user_code import is_user_code

TOOLS_PACKAGE = "a2tgpo.environment.tools"
RESERVED = ("think", "result", "answer")


def tool_names() -> list[str]:
    """Return the values that `tools.names` may contain: the names of the modules in environment/tools/."""
    # List the modules without importing them.
    package = importlib.import_module(TOOLS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def called_name(spec: str) -> str:
    """Return the name by which the policy calls the tool `spec` of `tools.names`."""
    return spec.rpartition(":")[2] if is_user_code(spec) else spec


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    """The policy's tools, and limits of every tool."""

    names: tuple[str, ...] = ("search",)
    """Tools that the policy may call. `NAME`: a module in environment/tools/. `path/to/file.py:NAME`: a class or
    function of your own (docs/tools.md). With protocol=tags, a call is <NAME> text </NAME>."""
    max_concurrent_calls: int = 16
    """Maximum number of calls that each rank runs at a time."""
    call_timeout_s: float = 240.0
    """Seconds after which a call fails. With a search server, this must be at least 2 x search.request_timeout_s x
    (search.max_attempts + 1)."""
    max_part_tokens: int = 400
    """Largest number of tokens in one part of a tool's answer, such as a passage. A longer part is cut."""
    on_outage: Literal["wait", "continue", "stop"] = "wait"
    """Reaction if a tool's service does not answer. `wait`: pause the rollout, and repeat the calls. `continue`: tell
    the policy that the call failed. `stop`: save and end the run."""
    outage_limit_s: float = 1800.0
    """With on_outage=wait, the run saves and ends with exit code 75 after an outage of this many seconds. With a
    search server, this must be less than parallel.timeout_s, because other ranks may wait in a collective during the
    outage."""

    def __post_init__(self) -> None:
        known = [name for name in tool_names() if name not in RESERVED]
        for name in self.names:
            if is_user_code(name):
                self._check_own(name)
            else:
                require(name in known, "tools.names", list(self.names), f"a list of {one_of(known, name)}")
        are_distinct = len(set(self.called_names)) == len(self.names) > 0
        require(are_distinct, "tools.names", list(self.names), "at least one tool, each once")
        for name in ("max_concurrent_calls", "max_part_tokens"):
            require(getattr(self, name) >= 1, f"tools.{name}", getattr(self, name), ">= 1")
        for name in ("call_timeout_s", "outage_limit_s"):
            require(getattr(self, name) > 0, f"tools.{name}", getattr(self, name), "> 0")

    def _check_own(self, spec: str) -> None:
        name = called_name(spec)
        if not name.isidentifier() or name in RESERVED:
            reserved = " | ".join(RESERVED)
            raise ConfigError(f"tools.names has {spec!r}; allowed: path/to/file.py:name, name not {reserved}")

    @property
    def called_names(self) -> tuple[str, ...]:
        """The names by which the policy calls the tools."""
        return tuple(map(called_name, self.names))

    @property
    def longest_outage_s(self) -> float | None:
        """Longest wait, in seconds, for a tool's service. None: the run continues without an answer."""
        return {"wait": self.outage_limit_s, "stop": 0.0, "continue": None}[self.on_outage]


@dataclass(frozen=True, kw_only=True)
class CalculatorConfig:
    max_digits: int = 1000
    """Maximum number of digits in a number. A calculation is refused if its result has more digits."""
    decimals: int = 10
    """Number of decimal places of a result."""

    def __post_init__(self) -> None:
        require(1 <= self.max_digits <= 4000, "calculator.max_digits", self.max_digits, "1 to 4000")
        require(0 <= self.decimals <= 50, "calculator.decimals", self.decimals, "0 to 50")
