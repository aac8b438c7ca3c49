import pytest
from scored import score_response

from a2tgpo.protocol.tag_format import extract_answer, is_well_formed, judged_text
from a2tgpo.reward.answer_match import exact_match, f1_score, normalize_answer

ANSWER = "<think> so </think> <answer> \\boxed{Paris} </answer>"


def test_tags_inside_a_retrieved_passage_do_not_count():
    turns = [("<think> a </think> <search> capital </search>", True), (ANSWER, False)]
    assert score_response(judged_text(turns), ["Paris"]).reward == 1.0
    raw = turns[0][0] + " <result> <answer> x </answer> </search> </result>" + ANSWER
    assert score_response(raw, ["Paris"]).reward == -1.0


def test_a_result_written_by_the_policy_breaks_the_format():
    assert not is_well_formed("<result> Paris </result>" + ANSWER)


def test_a_search_without_answer_from_the_environment_breaks_the_format():
    assert not is_well_formed(judged_text([("<search> a </search>", False), (ANSWER, False)]))


@pytest.mark.parametrize(
    "text", ["", "<think>", "</think><think>", "\\boxed{", "<answer>\\boxed{a", "}" * 50]
)
def test_broken_output_gets_the_format_penalty_and_never_raises(text):
    score = score_response(text, ["x"])
    assert score.reward == -1.0 and score.exact_match == 0.0 and not score.format_ok


def test_right_answer_in_bad_format_counts_for_the_ungated_match_only():
    score = score_response("<answer> \\boxed{Paris} </answer>", ["paris"])
    assert score.exact_match == 1.0 and score.reward == -1.0


def test_box_content_keeps_inner_braces():
    assert extract_answer("<answer>\\boxed{a{b}c}</answer>") == "a{b}c"


def test_normalisation_drops_case_punctuation_articles_and_spaces():
    assert normalize_answer("  The  U.S.A., an Ally ") == "usa ally"
    assert normalize_answer("Theatre") == "theatre"


def test_any_alias_counts_and_f1_is_the_best_over_aliases():
    assert exact_match("NYC", ["New York City", "nyc"]) == 1.0
    assert f1_score("New York", ["London", "New York City"]) == pytest.approx(0.8)
    assert f1_score("", ["London"]) == 0.0


def test_every_tool_call_needs_its_own_kind_of_exchange():
    both = ("search", "calculator")
    calls = [("<think> a </think> <search> b </search>", True), ("<calculator> 1 </calculator>", True)]
    assert is_well_formed(judged_text([*calls, (ANSWER, False)]), tools=both)
    crossed = judged_text([("<think> a </think> <search> b </calculator>", True), (ANSWER, False)])
    assert not is_well_formed(crossed, tools=both)
    # This run does not have the calculator, so the calculator's result answers no call.
    assert not is_well_formed(judged_text([*calls, (ANSWER, False)]))


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("A", ["A", " A "], ["", "the", "!", "an", "{}"]),
        ("The The", ["The The", "The  The"], ["", "The", "a", "?"]),
        ("?", ["?"], ["", "!", "the"]),
        ("...", ["..."], ["", "."]),
    ],
)
def test_a_gold_that_normalises_to_nothing_equals_the_same_text_only(gold, right, wrong):
    for answer in right:
        assert exact_match(answer, [gold]) == f1_score(answer, [gold]) == 1.0
    for answer in wrong:
        assert exact_match(answer, [gold, "Vitamin A"]) == 0.0
    assert exact_match("vitamin a", [gold, "Vitamin A"]) == 1.0


@pytest.mark.parametrize("box", ["", " ", "\n"])
def test_an_empty_box_is_never_right(box):
    for golds in (["A"], ["the"], ["", " "], ["Paris"]):
        score = score_response(f"<think> x </think> <answer> \\boxed{{{box}}} </answer>", golds)
        assert (score.exact_match, score.f1, score.reward, score.format_ok) == (0.0, 0.0, 0.0, True)


@pytest.mark.parametrize(
    ("block", "answer", "is_right"),
    [
        ("\\boxed {Paris}", "{Paris}", True),
        ("\\boxed {Paris} it is", "{Paris} it is", False),
        ("$\\boxed {Paris}$ it is", "{Paris}", True),
        ("\\boxed Paris", "Paris", True),
        ("\\boxed{London} \\boxed Paris", "Paris", True),
        ("\\boxed Paris \\boxed{London}", "Paris \\boxed{London}", False),
        ("\\boxed ", "", False),
    ],
)
def test_a_box_behind_a_space_is_read_to_the_end_and_breaks_the_format(block, answer, is_right):
    """As in the authors' code: the format check looks for `\\boxed{`, the reader takes the text after the space."""
    score = score_response(f"<think> x </think> <answer> {block}</answer>", ["Paris"])
    assert (score.answer, score.exact_match) == (answer, float(is_right))
    assert score.format_ok == ("\\boxed{" in block)


@pytest.mark.parametrize(
    ("answer", "gold", "em", "f1"),
    [
        ("北京。", "北京", 1.0, 1.0),
        ("「北京」", "北京", 1.0, 1.0),
        ("２０２４年", "2024年", 1.0, 1.0),
        ("ＮＨＫ", "NHK", 1.0, 1.0),
        ("ジョン・スミス", "ジョンスミス", 1.0, 1.0),
        ("北京市", "北京", 0.0, 0.8),
        ("东京", "京都", 0.0, 0.5),
        ("«Москва»", "москва", 1.0, 1.0),
        ("القاهرة؟", "القاهرة", 1.0, 1.0),
        ("दिल्ली।", "दिल्ली", 1.0, 1.0),
        ("。", "。", 1.0, 1.0),
        ("。", "、", 0.0, 0.0),
        ("", "北京", 0.0, 0.0),
    ],
)
def test_answers_in_other_scripts_lose_their_own_punctuation_and_match_by_characters(answer, gold, em, f1):
    assert (exact_match(answer, [gold]), f1_score(answer, [gold])) == pytest.approx((em, f1))


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("São Paulo – “Centro”", "são paulo – “centro”"),
        ("5 µm, 1º", "5 µm 1º"),
        ("Hawaiʻi…", "hawaiʻi…"),
        ("½ of Ⅷ 😀", "½ of ⅷ 😀"),
    ],
)
def test_latin_text_is_normalised_by_squads_rules_alone(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (
            "Beyonc\u00e9",
            "Beyonce\u0301",
        ),  # composed form, as Qwen's tokenizer normalises and its models write
        ("Hi\u1ebfu", "Hie\u0302\u0301u"),
        ("Paris", "Paris\u200e"),  # aliases from Wikidata have such marks
        ("cooperate", "co\u00adoperate"),
        ("\uac10", "\u1100\u1161\u11b7"),
    ],
)
def test_answers_that_look_the_same_are_the_same(answer, gold):
    assert exact_match(answer, [gold]) == exact_match(gold, [answer]) == f1_score(answer, [gold]) == 1.0
    assert exact_match(answer + "x", [gold]) == 0.0
