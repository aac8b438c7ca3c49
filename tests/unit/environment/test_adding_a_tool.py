import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.config.tools import tool_names
from a2tgpo.environment.tool import build_tools, function_schema
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.call_arguments import argument_text, one_text, typed
from a2tgpo.protocol.tag_format import is_well_formed
from a2tgpo.protocol.tag_syntax import CallSyntax
from a2tgpo.rollout.tool_pool import ToolFaultError, ToolPool
from a2tgpo.trajectory import Prompt

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which a run starts."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("a2tgpo_user_code_")]:
        del sys.modules[name]


def quickstart(*overrides):
    return load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))


def test_a_parameter_may_have_a_boolean_schema():
    tool = SimpleNamespace(parameters={"type": "object", "properties": {"x": True, "y": False}})
    parameters = function_schema("anything", tool)["function"]["parameters"]
    assert parameters["properties"] == {"x": {}, "y": {"not": {}}}
    assert argument_text({"x": [1]}, parameters) == '{"x": [1]}'
    assert typed({"x": "[1]"}, parameters) == {"x": [1]} and one_text(parameters, "a") is None


def test_the_documented_way_to_add_a_tool_works_as_it_stands(folder):
    (folder / "my_tools.py").write_text(code_blocks("python")[0], encoding="utf-8")
    (folder / "experiment.yaml").write_text(code_blocks("yaml")[0], encoding="utf-8")
    (folder / "corpus.jsonl").write_text('{"id": 1, "contents": "France\\nIts capital is Paris."}\n')
    toolset = build_tools(quickstart("experiment.yaml", "search.corpus=corpus.jsonl"))
    assert toolset.names == ("search", "weekday")
    pool = ToolPool(toolset)
    asked = {
        pool.submit("weekday", "2024-02-29"): ("Thursday",),
        pool.submit("weekday", "29 February"): ("Error: write the date as YYYY-MM-DD",),
        pool.submit("search", "capital of France"): ("Doc 1 (Title: France) Its capital is Paris.",),
    }
    got = {}
    while len(got) < len(asked):
        got |= {result.key: result.parts for result in pool.results(wait=True)}
    assert got == asked
    pool.close()
    toolset.close()
    syntax = CallSyntax(toolset.names)
    call = "<think> when? </think> <weekday> 2024-02-29 </weekday>"
    assert syntax.find_query(call, "weekday") == "2024-02-29"
    response = f"{call} <result></result> <answer> \\boxed{{Thursday}} </answer>"
    assert is_well_formed(response, tools=toolset.names)
    # If the tool is not configured, its tags are text, and the result belongs to no call.
    assert not is_well_formed(response)


def test_the_documented_session_plays_as_it_stands(folder):
    (folder / "my_tools.py").write_text(code_blocks("python")[1], encoding="utf-8")
    toolset = build_tools(quickstart("tools.names=[my_tools.py:guess]"))
    pool = ToolPool(toolset)
    prompt = Prompt(index=0, id="q", question="?", answers=("7",), tokens=(1,), record='{"number": 7}')
    sessions = pool.sessions_for(prompt)
    keys = [pool.submit("guess", text, sessions) for text in ("5", "9", "x", "7")]
    results = {}
    while len(results) < len(keys):
        results |= {result.key: result for result in pool.results(wait=True)}
    assert [results[key].parts[0] for key in keys] == [
        "too low",
        "too high",
        "Error: write a whole number",
        "right",
    ]
    assert [results[key].score for key in keys] == [0.0, 0.0, 0.0, 1.0]
    pool.end(sessions)
    assert pool.take_counts() == {"tools/open_sessions": 0}
    pool.close()
    toolset.close()


USERS_FILE = """
import types
number = 3
def raises(config):
    raise OSError("no licence")
def no_method(config):
    return types.SimpleNamespace(call=len)
class fails:
    def __init__(self, config): pass
    def call(self, text):
        return [{}["steps"]]
    def close(self): pass
def leaves(config):
    raise SystemExit(3)
class odd(fails):
    parameters = {"properties": ["date"]}
class unwritable(fails):
    parameters = {"properties": {"date": {"enum": {1, 2}}}}
class untold(fails):
    description = None
class broken(fails):
    def take_counts(self):
        return ["calls"]
    def close(self):
        1 / 0
class once:
    replayable = False
    def __init__(self, config): pass
    def open(self, record, question): pass
    def close(self): pass
"""


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "nowhere.py:tool",
            "tools.names is 'nowhere.py:tool', but there is no file nowhere.py; give the path",
        ),
        (
            "mine.py",
            "command line: tools.names has 'mine.py'; allowed: path/to/file.py:name, name not think |",
        ),
        (
            "mine.py:answer",
            "command line: tools.names has 'mine.py:answer'; allowed: path/to/file.py:name, name ",
        ),
        (
            "mine.py:rases",
            "but mine.py defines no rases; defined: types | number | raises | no_method | fails",
        ),
        (
            "mine.py:number",
            "allowed: a class or a function number(config), but it is int, which cannot be called",
        ),
        ("mine.py:raises", "tools.names: cannot build mine.py:raises: mine.py:5 raises: OSError: no licence"),
        (
            "mine.py:odd",
            "the attribute parameters of odd is {'properties': ['date']}, not a JSON schema like {",
        ),
        (
            "mine.py:unwritable",
            "the attribute parameters of unwritable is {'properties': {'date': {'enum': {1, 2}",
        ),
        ("mine.py:untold", "the attribute description of untold is None, not a text"),
        ("mine.py:leaves", "leaves: SystemExit: 3"),
        ("mine.py:no_method", "but SimpleNamespace has no method close; a tool has call(text) or open("),
        ("search,mine.py:search", "is ['search', 'mine.py:search']; allowed: at least one tool, each once"),
    ],
)
def test_a_users_tool_that_cannot_be_loaded_is_refused_in_one_line(folder, spec, says):
    (folder / "mine.py").write_text(USERS_FILE)
    with pytest.raises(ConfigError) as caught:
        build_tools(quickstart(f"tools.names=[{spec}]", "search.corpus="))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_of_a_users_tool_names_its_file_and_line(folder):
    (folder / "mine.py").write_text(USERS_FILE)
    pool = ToolPool(build_tools(quickstart("tools.names=[mine.py:fails]")))
    pool.submit("fails", "a")
    with pytest.raises(
        ToolFaultError, match=r"^the fails tool failed with KeyError: 'steps' at mine\.py:11; a tool"
    ):
        while True:
            pool.results(wait=True)
    pool.close()


def test_bugs_in_the_counts_and_the_end_of_a_tool_are_one_line(folder, caplog):
    (folder / "mine.py").write_text(USERS_FILE)
    toolset = build_tools(quickstart("tools.names=[mine.py:broken]"))
    with pytest.raises(
        RuntimeError, match=r"^the counts of the tool broken cannot be read: .*AttributeError"
    ):
        toolset.take_counts()
    toolset.close()
    (record,) = caplog.records
    expected = "could not close the tool broken: mine.py:25 close: ZeroDivisionError: division by zero"
    assert record.getMessage() == expected


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ("rollout.partial.tokens_per_step=300", "algorithm.correction.kind=truncate"),
            r"rollout\.partial\.tokens_per_step is 300; allowed: 0 with the tool once.*go on in a later step",
        ),
        (
            ("rollout.tree.initial=2", "algorithm.advantage=tree_grpo"),
            r"rollout\.tree\.initial is 2; allowed: 0 with the tool once, because its sessions cannot branch",
        ),
        (
            ("rollout.inner_branches=4", "algorithm.advantage=appo"),
            r"rollout\.inner_branches is 4; allowed: 0 with the tool once, because its sessions cannot branch",
        ),
    ],
    ids=["partial", "tree", "inner"],
)
def test_sessions_that_cannot_be_repeated_are_refused_if_calls_are_repeated(folder, settings, line):
    (folder / "mine.py").write_text(USERS_FILE)
    names = "tools.names=[mine.py:once]"
    build_tools(quickstart(names))
    with pytest.raises(ConfigError, match=f"^{line}"):
        build_tools(quickstart(names, *settings))


def test_a_tool_describes_itself_for_chat_templates(folder):
    (folder / "mine.py").write_text(USERS_FILE)
    toolset = build_tools(quickstart("tools.names=[calculator,mine.py:fails]"))
    calculator, fails = (function_schema(name, tool)["function"] for name, tool in toolset.tools.items())
    assert calculator["name"] == "calculator" and calculator["parameters"]["required"] == ["expression"]
    text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    assert fails == {"name": "fails", "description": "", "parameters": text}


def test_the_documentation_names_every_tool():
    for name in tool_names():
        assert f"| `{name}` |" in DOCS, name


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("[]", "is []; allowed: at least one tool, each once"),
        ("[search,search]", "is ['search', 'search']; allowed: at least one tool, each once"),
        (
            "[result]",
            "is ['result']; allowed: a list of calculator | mcp | python | search | visit | web_search",
        ),
        (
            "[serch]",
            "is ['serch']; allowed: a list of calculator | mcp | python | search | visit | web_search "
            "(nearest: search)",
        ),
        ("[search,1]", "is ['search', 1]; allowed: a list of texts"),
        ("search", "is 'search'; allowed: a list of texts; write [search]"),
        (
            "search, calculator",
            "is 'search, calculator'; allowed: a list of texts; write [search,calculator]",
        ),
    ],
)
def test_a_wrong_list_of_tools_is_refused_in_one_line(names, says):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "quickstart.yaml", [f"tools.names={names}"])
    assert str(caught.value) == f"command line: tools.names {says}"


def test_a_source_is_asked_for_only_where_search_is_offered():
    base = ROOT / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"search\.corpus"):
        load_config(base, ["search.corpus="])
    toolset = build_tools(load_config(base, ["search.corpus=", "tools.names=[calculator]"]))
    assert toolset.names == ("calculator",)
