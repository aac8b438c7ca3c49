"""Reading and writing calls without a tokenizer."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2tgpo.config.rollout import call_formats
from a2tgpo.protocol.call_arguments import ArgumentError, argument_text, typed
from a2tgpo.protocol.call_format import MAX_CALL_CHARS, MAX_CALLS, load_format
from a2tgpo.protocol.formats.hermes import FORMAT as HERMES
from a2tgpo.protocol.formats.llama_json import FORMAT as LLAMA
from a2tgpo.protocol.formats.qwen_xml import FORMAT as XML

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(), json_values, max_size=3)
names = st.text(min_size=1)
pieces = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            '{"',
            '"name"',
            ":",
            '"a"',
            "}",
            "[",
            "\\",
            ' {"name": "s", "arguments": {}}',
            "\n",
        ]
    )
    | st.text(max_size=3),
    max_size=40,
)


def read(text, fmt=HERMES):
    return [(call.name, call.arguments, call.problem) for call in fmt.find_calls(text)]


@given(
    st.text(alphabet=st.characters(exclude_characters="<")), st.lists(st.tuples(names, arguments), max_size=3)
)
@settings(max_examples=200, deadline=None)
def test_calls_are_read_as_they_were_written_whatever_their_arguments_hold(text, calls):
    assert read(HERMES.write(text, calls)) == [(name, given, None) for name, given in calls]


@given(names, arguments)
@settings(max_examples=100, deadline=None)
def test_the_one_call_of_a_llama_turn_is_read_as_it_was_written(name, given):
    assert read(LLAMA.write("", [(name, given)]), LLAMA) == [(name, given, None)]
    assert read(f"<|python_tag|>{LLAMA.write('', [(name, given)])}\n", LLAMA) == [(name, given, None)]


@pytest.mark.parametrize("name", call_formats())
@given(pieces)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_text_breaks_the_reading_of_calls(name, parts):
    for call in load_format(name).find_calls("".join(parts)):
        assert (call.problem is None) == (call.arguments is not None)
        assert call.problem is None or "\n" not in call.problem


CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "a"}}\n</tool_call>'
GOOD = ("search", {"query": "a"}, None)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        (CALL, [GOOD]),
        (f"text {CALL} more {CALL} end", [GOOD, GOOD]),
        (CALL.removesuffix("</tool_call>"), [GOOD]),
        (CALL.removesuffix("\n</tool_call>") + CALL, [GOOD, GOOD]),
        ('<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"a\\"}"}</tool_call>', [GOOD]),
        ('<tool_call>{"name": "search", "arguments": {"query": "b", "query": "a"}}</tool_call>', [GOOD]),
        ("</tool_call>", []),
    ],
)
def test_good_calls_are_found_in_order(text, calls):
    assert read(text) == calls


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ('{"name": "search", "arguments": ', "is not valid JSON"),
        ("search(a)", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('["search"]', "is not a JSON object"),
        ('{"arguments": {}}', 'has no "name"'),
        ('{"name": 3, "arguments": {}}', 'has no "name"'),
        ('{"name": "search"}', '"arguments" is not a JSON object'),
        ('{"name": "search", "arguments": "x"}', '"arguments" is not a JSON object'),
        ('{"name": "search", "arguments": [1]}', '"arguments" is not a JSON object'),
        ('{"name": "search", "arguments": {"query": NaN}}', "NaN is not JSON"),
        ('{"name": "search", "arguments": {"query": 1e999}}', "1e999 is not JSON"),
        ('{"name": "search", "arguments": {"query": "\\ud800"}}', "half of a surrogate pair"),
        ('{"name": "\\udc00", "arguments": {}}', "half of a surrogate pair"),
        ('{"name": "search", "arguments": {}} and more', "text after the JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({"name": "s", "arguments": {"query": "x" * MAX_CALL_CHARS}}), "longer than"),
    ],
)
def test_a_wrong_call_has_a_problem_and_its_neighbours_are_read(inside, problem):
    found = HERMES.find_calls(f"{CALL}<tool_call>{inside}</tool_call>{CALL}")
    assert [call.problem is None for call in found] == [True, False, True]
    assert problem in found[1].problem and len(found[1].problem) < 200


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "s", "parameters": {}}; {"name": "s", "parameters": {}}', "text after"),
        ('{"name": "s", "parameters": ', "not valid JSON"),
        ("<|python_tag|>print(1)", "not valid JSON"),
    ],
)
def test_a_wrong_call_of_llama_has_a_problem(text, problem):
    (found,) = LLAMA.find_calls(text)
    assert problem in found.problem


@pytest.mark.parametrize("text", ["{a} is a set", "The answer is {1}", '{"answer": 3}', ""])
def test_a_llama_turn_that_is_no_call_is_an_answer(text):
    assert LLAMA.find_calls(text) == []


@pytest.mark.parametrize(
    "piece", ['<tool_call>{"', "<tool_call>", '<tool_call>{"a":', "<tool_call>[[{", CALL]
)
def test_long_texts_are_read_in_linear_time(piece):
    def seconds(count):
        text = piece * count
        start = time.process_time()
        assert len(HERMES.find_calls(text)) <= MAX_CALLS
        return time.process_time() - start

    seconds(10)
    assert seconds(200_000) < 100 * max(seconds(20_000), 1e-3)


PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "limit": {"type": "integer"},
        "deep": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def test_a_tool_with_one_text_gets_the_text_and_any_other_tool_gets_json():
    assert argument_text({"query": " a b \n"}, QUERY) == "a b"
    assert argument_text({"query": "\n  for a in b:\n    a\n "}, QUERY) == "  for a in b:\n    a"
    given = {"name": "é", "limit": 3, "deep": None}
    assert json.loads(argument_text(given, PLACE)) == given


@pytest.mark.parametrize(
    ("given", "parameters", "problem"),
    [
        ({}, QUERY, "the argument 'query' is missing"),
        ({"query": "  "}, QUERY, "the argument 'query' is empty"),
        ({"query": 3}, QUERY, "the argument 'query' is not of type string"),
        ({"query": "a", "top_k": 3}, QUERY, "there is no argument 'top_k'; the arguments are: 'query'"),
        ({"name": "a", "limit": "3"}, PLACE, "the argument 'limit' is not of type integer"),
        ({"name": "a", "limit": True}, PLACE, "the argument 'limit' is not of type integer"),
        ({"name": "a", "deep": 0}, PLACE, "the argument 'deep' is not of type"),
    ],
)
def test_arguments_that_do_not_fit_the_tool_are_named(given, parameters, problem):
    with pytest.raises(ArgumentError, match=problem):
        argument_text(given, parameters)


xml_texts = st.text(alphabet=st.characters(exclude_characters="<\n"))
xml_names = st.text(alphabet="abc_", min_size=1)


@given(
    xml_texts, st.lists(st.tuples(xml_names, st.dictionaries(xml_names, xml_texts, max_size=3)), max_size=3)
)
@settings(max_examples=200, deadline=None)
def test_calls_in_xml_are_read_as_they_were_written(text, calls):
    assert read(XML.write(text, calls), XML) == [(name, given, None) for name, given in calls]


@pytest.mark.parametrize("value", ["a", "3", "{", "two\nlines", " ", "True"])
def test_a_text_in_xml_stays_the_text_it_is(value):
    (found,) = XML.find_calls(XML.write("", [("search", {"query": value})]))
    assert typed(found.arguments, QUERY) == {"query": value}


@pytest.mark.parametrize("given", [{"name": "3", "limit": 3, "deep": True}, {"name": "a", "deep": None}])
def test_numbers_and_flags_in_xml_get_the_types_of_the_tool(given):
    (found,) = XML.find_calls(XML.write("I look.", [("place", given)]))
    assert typed(found.arguments, PLACE) == given and json.loads(argument_text(given, PLACE)) == given


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ("", "not inside <function=NAME>"),
        ("<function=>\n</function>", "not inside <function=NAME>"),
        ("<function=a>", "not inside <function=NAME>"),
        ("<function=a>\nx</function>", "text before the first argument"),
        ("<function=a>\n<parameter=b>\nc\n</function>", "not inside <parameter=NAME>"),
        ("<function=a>\n<parameter=b>\nc\n</parameter> d</function>", "not inside <parameter=NAME>"),
        (f"<function=a>{'x' * MAX_CALL_CHARS}</function>", "longer than"),
    ],
)
def test_a_wrong_call_in_xml_has_a_problem_and_its_neighbours_are_read(inside, problem):
    good = XML.write("", [("search", {"query": "a"})])
    found = XML.find_calls(f"{good}<tool_call>{inside}</tool_call>{good}")
    assert [call.problem is None for call in found] == [True, False, True]
    assert problem in found[1].problem
