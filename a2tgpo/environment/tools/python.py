"""The python tool, which runs the policy's code in an isolated process and returns what the code prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a2tgpo.config.python import PythonConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.environment.sandbox.isolation import Sandbox, build_sandbox
from a2tgpo.environment.sandbox.process import MAX_CODE_BYTES, SandboxError, SandboxProcess
from a2tgpo.environment.tool import ToolError

NO_OUTPUT = "The code printed nothing."


DESCRIPTION = "Runs Python code, and returns what it prints and the value of its last expression."
PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "contentMediaType": "text/x-python", "description": "The code to run."}
    },
    "required": ["code"],
}


class PythonSession:
    """Runs the calls of one trajectory. The calls share variables until their process ends.

    Args:
        config: the section `python`.
        sandbox: starts the session's processes.
    """

    def __init__(self, config: PythonConfig, sandbox: Sandbox):
        self._config = config
        self._sandbox = sandbox
        self._process: SandboxProcess | None = None

    def call(self, text: str) -> list[str]:
        if len(text.encode("utf-8", "replace")) > MAX_CODE_BYTES:
            return [f"Error: the code has more than {MAX_CODE_BYTES} bytes"]
        try:
            self._process = self._process or self._sandbox.start()
        except SandboxError as error:
            raise ToolError(f"the code's process did not start: {error}") from None
        output, end = self._process.run(
            text, timeout_s=self._config.timeout_s, max_output_chars=self._config.max_output_chars
        )
        if end is not None:
            self._process = None
            output += f"\nError: {end}" + ("; its variables are lost" if self._config.stateful else "")
        return [output.strip() or NO_OUTPUT]

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


class Python:
    """Runs every call in its own process."""

    description = DESCRIPTION
    parameters = PARAMETERS

    def __init__(self, config: PythonConfig, sandbox: Sandbox):
        self._config = config
        self._sandbox = sandbox

    def call(self, text: str) -> list[str]:
        session = PythonSession(self._config, self._sandbox)
        try:
            return session.call(text)
        finally:
            session.close()

    def close(self) -> None:
        self._sandbox.close()


class StatefulPython:
    """Runs all calls of a trajectory in one process."""

    description = f"{DESCRIPTION} Variables are kept between calls."
    parameters = PARAMETERS

    def __init__(self, config: PythonConfig, sandbox: Sandbox):
        self._config = config
        self._sandbox = sandbox

    def open(self, record: Mapping[str, Any], question: str) -> PythonSession:
        return PythonSession(self._config, self._sandbox)

    def close(self) -> None:
        self._sandbox.close()


def build(config: RunConfig) -> Python | StatefulPython:
    """Build the tool, and check that the isolation of its code works."""
    kind = StatefulPython if config.python.stateful else Python
    return kind(config.python, build_sandbox(config.python))
