"""The interface through which a rollout calls its tools."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.config.tools import TOOLS_PACKAGE, called_name
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.user_code import fault_line, is_user_code, load_user_code, user_file

logger = logging.getLogger(__name__)


class ToolError(RuntimeError):
    """Raised if a tool cannot answer a call. The message gives the cause in one line, which the policy reads."""


class ToolUnavailableError(ToolError):
    """Raised if the tool's service seems to be unavailable to all callers. The same call may succeed later."""


class Tool(Protocol):
    """A tool that the policy can call. Many threads may call its methods at the same time.

    A tool may have a text for the policy in the attribute `description`, and a JSON schema of the call's arguments in
    the attribute `parameters` (see `function_schema`).
    """

    def call(self, text: str) -> list[str]:
        """Return one or more parts of the answer to `text`, the best first.

        If the policy has made a mistake, return an answer that explains the mistake.

        Args:
            text: what the policy wrote for the tool: one text, or the JSON of several arguments. Never empty.

        Raises:
            ToolError: if there is no answer.
            ToolUnavailableError: if the tool can answer no call now. `tools.on_outage` then decides what happens.
        """

    def close(self) -> None:
        """Release the tool's resources. The tool is not called after this."""


class Session(Protocol):
    """The state of a tool for one trajectory. Only one thread at a time calls its methods.

    A session may have a method `score() -> float`, which is called after each call. The returned number says how much
    the call increased the chance of success. The number becomes part of the turn's score (`Turn.score`).
    """

    def call(self, text: str) -> list[str]:
        """Answer a call, as `Tool.call` does."""

    def close(self) -> None:
        """Release the session's resources. The session is not called after this."""


@runtime_checkable
class SessionTool(Protocol):
    """A tool that keeps a state between the calls of one trajectory. Many threads may call its methods.

    If a trajectory continues in a later step (partial rollouts) or in a branch (trees), a new session is opened, and
    the trajectory's earlier calls are repeated. If this does not restore the state, the tool must have the attribute
    `replayable` = False.
    """

    def open(self, record: Mapping[str, Any], question: str) -> Session:
        """Return a new session for a trajectory of `question`, whose record in the question set is `record`.

        Raises:
            ToolError: as in `Tool.call`.
        """

    def close(self) -> None:
        """Release the tool's resources. All sessions have been closed before this call."""


AnyTool = Tool | SessionTool


def function_schema(name: str, tool: AnyTool) -> dict[str, Any]:
    """Return the description of a tool, in the form that chat templates expect. A tool without `parameters` takes one
    text.

    If a parameter's schema is true or false, as JSON Schema allows, an equivalent object replaces it."""
    one_text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    parameters = dict(getattr(tool, "parameters", one_text))
    if isinstance(properties := parameters.get("properties"), Mapping):
        parameters["properties"] = {key: _as_object(schema) for key, schema in properties.items()}
    function = {
        "name": name,
        "description": getattr(tool, "description", ""),
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


def _as_object(schema: Any) -> Any:
    """Return a JSON schema as an object, even if it is true (any value is allowed) or false (no value is allowed)."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    return schema


@dataclass(frozen=True, kw_only=True)
class Toolset:
    """The tools of a run and the limits that they share."""

    tools: Mapping[str, AnyTool]
    """Maps each tool's name to the tool. The name is also the tag of the tool's calls."""
    max_concurrent_calls: int = 16
    """Largest number of calls that run at the same time on one rank."""
    call_timeout_s: float = 240.0
    """Seconds after which a running call fails. The time in the queue is not included."""
    outage_limit_s: float | None = None
    """Seconds for which a call that raises `ToolUnavailableError` is repeated before the run ends. 0: the run ends at
    once. None: the call is not repeated, and the policy reads that the call failed."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The descriptions of all tools, in the form that chat templates expect."""
        return [function_schema(name, tool) for name, tool in self.tools.items()]

    def take_counts(self) -> dict[str, float]:
        """Return the counts of the tools since the last call of this method, by the names `TOOL/COUNT`.

        A tool reports counts if it has a method `take_counts`.
        """
        counts: dict[str, float] = {}
        for name, tool in self.tools.items():
            try:
                own: dict[str, float] = getattr(tool, "take_counts", dict)()
                counts |= {f"{name}/{count}": number + 0 for count, number in own.items()}
            except Exception as error:
                raise RuntimeError(
                    f"the counts of the tool {name} cannot be read: {fault_line(error, Path(users_file(tool)))}"
                ) from None
        return counts

    def close(self) -> None:
        """Close all tools. Log a warning for each tool that fails to close."""
        for name, tool in self.tools.items():
            try:
                tool.close()
            except Exception as error:
                place = fault_line(error, Path(users_file(tool)))
                logger.warning("could not close the tool %s: %s", name, place)


def build_tools(config: RunConfig) -> Toolset:
    """Build the tools that `tools.names` lists. Every rank must build its own tools.

    Raises:
        ConfigError: with a one-line message, if a tool cannot be loaded, or cannot work with this configuration.
    """
    tools = {called_name(spec): _build(spec, config) for spec in config.tools.names}
    for name, tool in tools.items():
        if isinstance(tool, SessionTool) and not getattr(tool, "replayable", True):
            _require_no_replay(name, config.rollout)
    return Toolset(
        tools=MappingProxyType(tools),
        max_concurrent_calls=config.tools.max_concurrent_calls,
        call_timeout_s=config.tools.call_timeout_s,
        outage_limit_s=config.tools.longest_outage_s,
    )


def _require_no_replay(name: str, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` if `rollout` repeats calls of the tool `name`, whose sessions cannot be restored."""
    for key, value, what in (
        ("partial.tokens_per_step", rollout.partial.tokens_per_step, "go on in a later step"),
        ("tree.initial", rollout.tree.initial, "branch"),
        ("inner_branches", rollout.inner_branches, "branch"),
    ):
        require(
            value == 0,
            f"rollout.{key}",
            value,
            f"0 with the tool {name}, because its sessions cannot {what} (replayable = False)",
        )


def tool_schemas(config: RunConfig) -> list[dict[str, Any]]:
    """Return the descriptions of the tools. If the prompts describe no tools, return only the tools' names.

    Raises:
        ConfigError: with a one-line message, if a tool cannot be built.
    """
    if not config.rollout.describes_tools:
        return [{"type": "function", "function": {"name": name}} for name in config.tools.called_names]
    toolset = build_tools(config)
    toolset.close()
    return toolset.schemas


def users_file(tool: AnyTool) -> str:
    """Return the user's file that defines the tool's class, or "" if there is no such file."""
    try:
        return "" if type(tool).__module__.startswith(f"{TOOLS_PACKAGE}.") else inspect.getfile(type(tool))
    except TypeError:
        return ""


def _build(spec: str, config: RunConfig) -> AnyTool:
    if not is_user_code(spec):
        built: AnyTool = importlib.import_module(f"{TOOLS_PACKAGE}.{spec}").build(config)
        _require_description(built, spec)
        return built
    path, name = user_file(spec, "tools.names")
    build = load_user_code(spec, "tools.names")
    if not callable(build):
        raise ConfigError(
            f"tools.names is {spec!r}; allowed: a class or a function {name}(config), but it is "
            f"{type(build).__name__}, which cannot be called (docs/tools.md)"
        )
    try:
        tool: AnyTool = build(config)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"tools.names: cannot build {spec}: {fault_line(error, path)}") from None
    _require_description(tool, spec)
    methods = ("open", "close") if hasattr(tool, "open") else ("call", "close")
    if missing := [method for method in methods if not callable(getattr(tool, method, None))]:
        raise ConfigError(
            f"tools.names is {spec!r}, but {type(tool).__name__} has no method {missing[0]}; a tool has call(text) "
            "or open(record, question), and close() (docs/tools.md)"
        )
    return tool


def _require_description(tool: AnyTool, spec: str) -> None:
    """Raise `ConfigError` unless chat templates can render the tool's `description` and `parameters`."""
    description, parameters = getattr(tool, "description", ""), getattr(tool, "parameters", {})
    if not isinstance(description, str):
        raise ConfigError(
            f"tools.names is {spec!r}, but the attribute description of {type(tool).__name__} is "
            f"{description!r:.80}, not a text (docs/tools.md)"
        )
    try:
        is_schema = _is_object_schema(json.loads(json.dumps(parameters)))
    except (TypeError, ValueError, RecursionError):
        is_schema = False
    if not is_schema:
        raise ConfigError(
            f"tools.names is {spec!r}, but the attribute parameters of {type(tool).__name__} is {parameters!r:.200}, "
            'not a JSON schema like {"type": "object", "properties": {"date": {"type": "string"}}, "required": '
            '["date"]} (docs/tools.md)'
        )


def _is_object_schema(parameters: Any) -> bool:
    """Return whether `parameters`, a decoded JSON value, is a schema against which arguments can be checked."""
    if not isinstance(parameters, dict):
        return False
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    return (
        isinstance(properties, dict)
        and all(isinstance(schema, dict | bool) for schema in properties.values())
        and isinstance(required, list)
        and all(isinstance(name, str) for name in required)
    )
