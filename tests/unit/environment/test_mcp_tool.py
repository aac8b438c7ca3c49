"""The mcp tool with a real server in a separate process."""

import os
import sys
from pathlib import Path

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.config.mcp import McpConfig
from a2tgpo.environment.tool import ToolError, ToolUnavailableError, build_tools, function_schema
from a2tgpo.environment.tools.mcp import McpTool, StatefulMcpTool
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.call_arguments import argument_text

mcp = pytest.importorskip("mcp", reason="the package of a2tgpo[mcp] is not installed")

ROOT = Path(__file__).parents[3]
SERVER = """
import os, sys
from mcp.server.mcpserver import MCPServer
sys.stderr = open(os.devnull, "w")
server = MCPServer("test")
total = 0
@server.tool()
def add(a: int, b: int) -> str:
    '''Adds two numbers.'''
    return str(a + b)
@server.tool()
def count(word: str) -> str:
    '''Counts its calls.'''
    global total
    total += 1
    if word == "end":
        os._exit(1)
    if word == "fail":
        raise ValueError("no such word")
    return f"{word} {total}"
server.run()
"""

ANYTHING = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    answer = {"jsonrpc": "2.0", "id": message["id"]}
    if message["method"] == "initialize":
        version = message["params"]["protocolVersion"]
        server = {"name": "x", "version": "1"}
        answer["result"] = {"protocolVersion": version, "capabilities": {}, "serverInfo": server}
    elif message["method"] == "tools/list":
        schema = {"type": "object", "properties": {"x": True}}
        answer["result"] = {"tools": [{"name": "show", "inputSchema": schema}]}
    elif message["method"] == "tools/call":
        text = json.dumps(message["params"]["arguments"]["x"])
        answer["result"] = {"content": [{"type": "text", "text": text}]}
    else:  # without an answer, the client waits ten seconds before it asks in an older version
        answer["error"] = {"code": -32601, "message": "no such method"}
    print(json.dumps(answer), flush=True)
"""
"""A server that needs no package, and has a tool whose parameter has the schema `true`."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    file = tmp_path_factory.mktemp("mcp") / "server.py"
    file.write_text(SERVER)
    return (sys.executable, str(file))


@pytest.fixture
def children():
    """Return the processes that this test has started and that still run."""
    before = set(running())
    return lambda: set(running()) - before


def running():
    own = str(os.getpid())
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == own and fields[0] != "Z":
            yield int(status.parent.name)


def test_a_servers_tool_is_called_and_its_connection_opened_again(command, children):
    tool = McpTool(McpConfig(command=command, tool="count"))
    schema = function_schema("mcp", tool)["function"]
    assert schema["description"] == "Counts its calls." and schema["parameters"]["required"] == ["word"]
    assert [tool.call(word) for word in ("a", "b")] == [["a 1"], ["b 2"]]
    (answer,) = tool.call("fail")
    assert answer.startswith("Error executing tool count")
    with pytest.raises(ToolError, match="the MCP server ended the connection"):
        tool.call("end")
    assert tool.call("c") == ["c 1"]
    tool.close()
    assert not children()


def test_arguments_of_several_parameters_are_a_json_object(command):
    tool = McpTool(McpConfig(command=command, tool="add"))
    assert tool.call('{"a": 40, "b": 2}') == ["42"]
    for text in ("40 and 2", "[40, 2]", '{"a": "\\ud800", "b": 2}'):
        assert tool.call(text) == ["Error: the arguments are not a JSON object"]
    (wrong,) = tool.call('{"a": "x", "b": 2}')
    assert "valid" in wrong
    tool.close()


def test_a_parameter_that_may_be_anything_gets_any_value(tmp_path):
    file = tmp_path / "server.py"
    file.write_text(ANYTHING)
    tool = McpTool(McpConfig(command=(sys.executable, str(file))))
    schema = function_schema("mcp", tool)["function"]["parameters"]
    assert argument_text({"x": [1]}, schema) == '{"x": [1]}'
    assert tool.call('{"x": [1]}') == ["[1]"]
    tool.close()


def test_trajectories_may_have_servers_of_their_own(command, children):
    tool = StatefulMcpTool(McpConfig(command=command, tool="count", stateful=True))
    first, second = tool.open({}, "q"), tool.open({}, "q")
    assert [first.call("a"), first.call("b"), second.call("c")] == [["a 1"], ["b 2"], ["c 1"]]
    first.close()
    second.close()
    tool.close()
    assert not children()


def test_a_server_that_has_lost_its_tool_is_unavailable_and_no_bug(tmp_path, children):
    file = tmp_path / "server.py"
    file.write_text(ANYTHING)
    tool = StatefulMcpTool(McpConfig(command=(sys.executable, str(file)), tool="show", stateful=True))
    file.write_text(ANYTHING.replace('"show"', '"other"'))
    with pytest.raises(ToolUnavailableError, match=r"other tools than at the start: mcp\.tool is 'show'"):
        tool.open({}, "q")
    tool.close()
    assert not children()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([], "mcp.command is []; allowed: a command, or mcp.url (''), and not both"),
        (
            ["mcp.command=[/no/such]"],
            "mcp.command is ['/no/such'], but the MCP server does not start: FileNotFound",
        ),
        (
            ["mcp.url=http://127.0.0.1:9/mcp"],
            "mcp.url is 'http://127.0.0.1:9/mcp', but the MCP server does not start",
        ),
        (["COMMAND"], "mcp.tool is ''; allowed: add | count"),
        (["COMMAND", "mcp.tool=ad"], "mcp.tool is 'ad'; allowed: add | count (nearest: add)"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_in_one_line(command, settings, says):
    given = [f"mcp.command=[{','.join(command)}]" if value == "COMMAND" else value for value in settings]
    with pytest.raises(ConfigError) as caught:
        build_tools(load_config(ROOT / "configs" / "quickstart.yaml", ["tools.names=[mcp]", *given]))
    assert says in str(caught.value) and "\n" not in str(caught.value)
