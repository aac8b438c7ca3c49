import re
import sys
from pathlib import Path

import pytest

import a2tgpo.environment.tools
from a2tgpo.config.load import load_config
from a2tgpo.config.tools import ToolsConfig, tool_names
from a2tgpo.environment.tool import build_tools
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.tag_format import is_well_formed
from a2tgpo.protocol.tag_syntax import CallSyntax
from a2tgpo.rollout.tool_pool import ToolPool

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")


def code_block(language: str) -> str:
    """The one block of `language` in docs/tools.md."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture
def new_tool(tmp_path, monkeypatch):
    """Puts a source file where environment/tools/ is looked up; forgets it afterwards."""

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        path = [*a2tgpo.environment.tools.__path__, str(tmp_path)]
        monkeypatch.setattr(a2tgpo.environment.tools, "__path__", path)

    yield add
    sys.modules.pop("a2tgpo.environment.tools.weekday", None)


def test_the_documented_way_to_add_a_tool_works_as_it_stands(new_tool, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"tools\.names is \['search', 'weekday'\]; allowed: a list of calculator \| python \| search",
    ):
        ToolsConfig(names=("search", "weekday"))
    new_tool("weekday", code_block("python"))
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(code_block("yaml"), encoding="utf-8")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": 1, "contents": "France\\nIts capital is Paris."}\n')
    overrides = [str(experiment), f"search.corpus={corpus}"]
    toolset = build_tools(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
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
    # Where it is no tool its tags are text, and the result answers nothing.
    assert not is_well_formed(response)


def test_the_new_tool_is_gone_after_the_test():
    assert tool_names() == ["calculator", "python", "search"]


def test_the_documentation_names_every_tool():
    for name in tool_names():
        assert f"| `{name}` |" in DOCS, name


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("[]", "is []; allowed: at least one tool, each once"),
        ("[search,search]", "is ['search', 'search']; allowed: at least one tool, each once"),
        ("[result]", "is ['result']; allowed: a list of calculator | python | search"),
        ("[serch]", "is ['serch']; allowed: a list of calculator | python | search (nearest: search)"),
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
