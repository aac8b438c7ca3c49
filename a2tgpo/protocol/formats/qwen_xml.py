"""The calls of Qwen3-Coder, Qwen3.5 and later: tags for the tool and for each argument, any number in a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from a2tgpo.protocol.call_format import MAX_CALL_CHARS, MAX_CALLS, CallFormat, WrittenCall, dump_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_CLOSE = "<function=", "</function>"
_PARAMETER, _PARAMETER_CLOSE = "<parameter=", "</parameter>"


class QwenXml:
    """A call is <tool_call> <function=NAME> <parameter=KEY> value </parameter> </function> </tool_call>.

    The values are texts. Only the tool's parameters say which values are numbers or JSON.
    """

    tags: tuple[str, ...] = (OPEN, CLOSE)

    def find_calls(self, text: str) -> list[WrittenCall]:
        bodies = text.split(OPEN)[1 : MAX_CALLS + 1]
        return [_call(body.partition(CLOSE)[0].strip()) for body in bodies]

    def write(self, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        written = "\n".join(_written(name, arguments) for name, arguments in calls)
        return f"{text}\n\n{written}" if text and written else text or written


FORMAT: CallFormat = QwenXml()


def _call(body: str) -> WrittenCall:
    if len(body) > MAX_CALL_CHARS:
        problem = f"the call is longer than {MAX_CALL_CHARS} characters"
        return WrittenCall(text=body[:MAX_CALL_CHARS], problem=problem)
    name, _, rest = body.removeprefix(_FUNCTION).partition(">")
    if not body.startswith(_FUNCTION) or not name.strip() or not body.endswith(_FUNCTION_CLOSE):
        return WrittenCall(text=body, problem="the call is not inside <function=NAME> and </function>")
    before, *values = rest.removesuffix(_FUNCTION_CLOSE).split(_PARAMETER)
    arguments = {}
    for value in values:
        key, has_key, content = value.partition(">")
        content, is_closed, after = content.rpartition(_PARAMETER_CLOSE)
        if not has_key or not is_closed or after.strip():
            problem = "an argument is not inside <parameter=NAME> and </parameter>"
            return WrittenCall(text=body, name=name.strip(), problem=problem)
        arguments[key.strip()] = content.removeprefix("\n").removesuffix("\n")
    if before.strip():
        return WrittenCall(text=body, name=name.strip(), problem="there is text before the first argument")
    return WrittenCall(text=body, name=name.strip(), arguments=arguments, has_texts=True)


def _written(name: str, arguments: Mapping[str, Any]) -> str:
    parameters = "".join(
        f"{_PARAMETER}{key}>\n{_value(value)}\n{_PARAMETER_CLOSE}\n" for key, value in arguments.items()
    )
    return f"{OPEN}\n{_FUNCTION}{name}>\n{parameters}{_FUNCTION_CLOSE}\n{CLOSE}"


def _value(value: Any) -> str:
    return dump_json(value) if isinstance(value, dict | list) else str(value)
