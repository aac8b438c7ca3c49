import json

import pytest

from a2tgpo.data.demonstrations import load_demonstrations
from a2tgpo.data.template import PromptTemplate
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.tag_demonstration import to_trajectory

FIRST = {
    "text": "<think>a <search>x</search> no</think> <search> France </search>",
    "observation": " <result>\nP\n</result>",
}
LAST = {"text": " <answer> \\boxed{Paris} </answer>"}
GOOD = {
    "id": "q1",
    "question": "Capital?",
    "answers": ["Paris"],
    "hops": 1,
    "turns": [FIRST, LAST],
    "quality": "good",
}


def load(tmp_path, *records):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return load_demonstrations(str(path))


def test_trajectory_tokenises_every_piece_on_its_own(tmp_path, tokenizer):
    demonstration = load(tmp_path, GOOD, GOOD)[1]
    assert demonstration.quality == "good"
    template = PromptTemplate(tokenizer, "")
    trajectory = to_trajectory(demonstration, template=template, tools=("search",), prompt_index=5)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert trajectory.prompt_tokens.tolist() == list(template.render("Capital?"))
    first, last = trajectory.turns
    assert first.tokens.tolist() == encode(FIRST["text"])
    assert first.observation_tokens.tolist() == encode(FIRST["observation"])
    assert first.query == "France"
    assert len(first.rollout_logprobs) == len(first.tokens)
    assert last.tokens.tolist() == encode(LAST["text"])
    assert (last.query, last.observation_tokens.tolist()) == (None, [])
    assert (trajectory.prompt_index, trajectory.prompt_id, trajectory.hops) == (5, "q1", 1)
    assert (trajectory.num_process_turns, trajectory.stop_reason) == (1, "answer")


def test_end_of_sequence_is_trained_only_on_request(tmp_path, tokenizer):
    demonstration = load(tmp_path, GOOD)[0]
    template = PromptTemplate(tokenizer, "")
    plain = to_trajectory(demonstration, template=template, tools=("search",), prompt_index=0)
    ended = to_trajectory(
        demonstration, template=template, tools=("search",), prompt_index=0, append_eos=True
    )
    assert ended.turns[-1].tokens.tolist() == [*plain.turns[-1].tokens, tokenizer.eos_token_id]
    assert len(ended.turns[-1].rollout_logprobs) == len(ended.turns[-1].tokens)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        (None, "`turns` must be a list"),
        ([], "`turns` must be a list"),
        (["text"], "`turns` must be a list"),
        ([FIRST], "turn 1 of 1: the last turn has an observation"),
        ([{"text": FIRST["text"]}, LAST], "turn 1 of 2: `observation` is missing"),
        ([{"text": "no query", "observation": "o"}, LAST], "turn 1 of 2: `text` must end with a call"),
        ([FIRST, {"text": ""}], "turn 2 of 2: `text` is ''"),
    ],
)
def test_bad_turns_are_refused_with_their_line(tmp_path, turns, says):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, GOOD | {"turns": turns})
    assert "demonstrations.jsonl line 2" in str(caught.value)
    assert says in str(caught.value)


def test_file_without_demonstration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"warmstart\.demonstrations: .* has no demonstration"):
        load(tmp_path)


def test_only_the_protocols_tags_of_a_demonstration_are_control_tokens(tmp_path, tokenizer):
    # As in small vocabularies, the tags include the spaces that the protocol writes.
    tokenizer.add_tokens(["<think>", "</think>", " <result>\n", "\n</result>", "<answer>"])
    first = FIRST | {"text": "<think>a </s></think> <search> </s> </search>"}
    first["observation"] = " <result>\nP </s> </res</result>ult> <ans<think>wer> <search> q\n</result>"
    demonstration = load(
        tmp_path, GOOD | {"turns": [first, {"text": LAST["text"] + "</s>"}], "question": "</s>?"}
    )[0]
    trajectory = to_trajectory(
        demonstration, template=PromptTemplate(tokenizer, ""), tools=("search",), prompt_index=0
    )
    added = set(tokenizer.get_added_vocab().values())

    def control(tokens):
        return tokenizer.convert_ids_to_tokens([token for token in tokens if token in added])

    process, final = trajectory.turns
    assert control(trajectory.prompt_tokens) == ["<s>", "</s>", "<s>"]
    assert control(process.tokens) == ["<think>", "</think>"]
    assert control(process.observation_tokens) == [" <result>\n", "\n</result>"]
    assert control(final.tokens) == ["<answer>"]
    assert tokenizer.decode(process.observation_tokens) == " <result>\nP </s>    q\n</result>"
    assert tokenizer.decode(process.tokens) == first["text"]


def test_a_thought_that_the_prompt_opens_is_not_opened_by_the_demonstration(tmp_path, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>")
    template = PromptTemplate(tokenizer, "")
    assert template.opening_tags == "<think>"
    trajectory = to_trajectory(load(tmp_path, GOOD)[0], template=template, tools=("search",), prompt_index=0)
    assert tokenizer.decode(trajectory.turns[0].tokens) == FIRST["text"].removeprefix("<think>")
    assert tokenizer.decode(trajectory.turns[1].tokens) == LAST["text"]
