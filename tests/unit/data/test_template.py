import pytest

from a2tgpo.config.check import ConfigError
from a2tgpo.data.question_set import Question
from a2tgpo.data.template import PromptSet, PromptTemplate


def question(name, text, hops=0):
    return Question(id=name, question=text, answers=("yes",), hops=hops)


def test_prompt_is_the_chat_template_with_generation_header(tokenizer):
    tokens = PromptTemplate(tokenizer, "Be brief.").render("Why?")
    assert tokenizer.decode(tokens) == "<s>system\nBe brief.</s><s>user\nWhy?</s><s>assistant\n"
    direct = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(tokens) == direct


def test_no_instructions_means_no_system_message(tokenizer):
    assert tokenizer.decode(PromptTemplate(tokenizer, "").render("Why?")) == "<s>user\nWhy?</s><s>assistant\n"


def test_prompts_of_a_step_are_indexed_by_their_place_in_it(tokenizer):
    template = PromptTemplate(tokenizer, "")
    prompt_set = PromptSet([question("a", "A?"), question("b", "B?", hops=2)], template, max_prompt_tokens=99)
    prompts = prompt_set.prompts([1, 0])
    assert [(prompt.index, prompt.id, prompt.hops) for prompt in prompts] == [(0, "b", 2), (1, "a", 0)]
    assert prompts[0].tokens == template.render("B?")
    assert prompts[0].answers == ("yes",)


def test_prompt_past_the_budget_names_question_and_length(tokenizer):
    template = PromptTemplate(tokenizer, "")
    length = len(template.render("long one?"))
    questions = [question("a", "A?"), question("b", "long one?")]
    assert len(PromptSet(questions, template, max_prompt_tokens=length)) == 2
    with pytest.raises(
        ConfigError, match=rf"'b' has {length} tokens; allowed: .*max_prompt_tokens={length - 1};"
    ):
        PromptSet(questions, template, max_prompt_tokens=length - 1)


def test_missing_or_refusing_chat_template_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ConfigError, match=r"toy refuses a system message.*System role not supported"
    ) as caught:
        PromptTemplate(tokenizer, "Be brief.")
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="tokenizer of toy has no chat template"):
        PromptTemplate(tokenizer, "Be brief.")
