"""The tools that the policy may call, and the calculator's settings."""

import importlib
import pkgutil
from dataclasses import dataclass

from a2tgpo.io.errors import require

TOOLS_PACKAGE = "a2tgpo.environment.tools"
RESERVED = ("think", "result", "answer")


def tool_names() -> list[str]:
    """Allowed names in `tools.names`: the modules in environment/tools/, which are listed but not imported."""
    package = importlib.import_module(TOOLS_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    names: str = "search"
    """Tools offered, separated by commas: search | calculator, or any other module in environment/tools/
    (docs/tools.md). The policy calls one as <NAME> text </NAME>."""

    def __post_init__(self) -> None:
        known = [name for name in tool_names() if name not in RESERVED]
        for name in self.selected:
            require(name in known, "tools.names", self.names, f"{', '.join(known)}, separated by commas")
        require(
            len(set(self.selected)) == len(self.selected) > 0, "tools.names", self.names, "each tool once"
        )

    @property
    def selected(self) -> tuple[str, ...]:
        """The names as a list."""
        return tuple(name.strip() for name in self.names.split(","))


@dataclass(frozen=True, kw_only=True)
class CalculatorConfig:
    max_digits: int = 1000
    """Digits that a number may have; what would grow past them is refused."""
    decimals: int = 10
    """Digits behind the point of a result."""

    def __post_init__(self) -> None:
        require(1 <= self.max_digits <= 4000, "calculator.max_digits", self.max_digits, "1 to 4000")
        require(0 <= self.decimals <= 50, "calculator.decimals", self.decimals, "0 to 50")
