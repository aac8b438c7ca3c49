"""Settings of the python tool, which runs the policy's code."""

from dataclasses import dataclass
from typing import Literal

from a2tgpo.config.expand import Expanded
from a2tgpo.io.errors import require

LONGEST_START_S = 30.0
"""Longest time, in seconds, that the process of a call may take to start."""


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """The python tool's limits, and what isolates the code from the machine (docs/tools.md)."""

    timeout_s: float = 10.0
    """Seconds that a call's code may run, not counting the start of its process."""
    memory_mib: int = 1024
    """Limit, in MiB, of the address space of the code's process."""
    max_output_chars: int = 4000
    """If the output of a call is longer than this many characters, its middle is left out."""
    isolation: Literal["auto", "bwrap", "namespace", "seccomp"] = "auto"
    """What isolates the code. `seccomp`: only a filter of system calls. `namespace`: the filter, and the kernel's
    user and network namespaces. `bwrap`: the filter, and the program bubblewrap, which hides the machine's files.
    `auto`: the strongest of the three that works on this machine."""
    stateful: bool = False
    """`true`: the calls of one trajectory share their variables. `false`: every call starts anew."""
    packages: Expanded = ""
    """Folder of packages that the code may import, made for example by `pip install --target`. Empty: the standard
    library only."""

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, "python.timeout_s", self.timeout_s, "> 0")
        require(self.memory_mib >= 64, "python.memory_mib", self.memory_mib, ">= 64")
        require(self.max_output_chars >= 100, "python.max_output_chars", self.max_output_chars, ">= 100")
