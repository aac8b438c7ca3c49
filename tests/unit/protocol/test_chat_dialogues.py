"""The tokens that a rollout appends equal those that the chat template renders for the whole conversation."""

import pytest
from chat_models import PLACE, SEARCH, llama_tokenizer, qwen_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2tgpo.data.literal_text import BREAK
from a2tgpo.data.template import PromptTemplate
from a2tgpo.protocol.chat import ChatProtocol
from a2tgpo.protocol.frames import call_message, result_messages

EXAMPLES = 260
"""The number of random dialogues for each of the four tokenizers."""

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<" + BREAK), max_size=12).map(
    str.strip
)
words = st.sampled_from(
    ["", "Paris", 'the "old" town', "a\n\nb", "x: {y}", "日本の 首都", "\\boxed{3}", "😀", "\t\\n"]
)
texts = st.one_of(words, plain).map(str.strip)
calls = st.one_of(
    st.tuples(st.just("search"), st.fixed_dictionaries({"query": texts})),
    st.tuples(st.just("place"), st.fixed_dictionaries({"name": texts, "limit": st.integers()})),
)
turns = st.tuples(texts, st.lists(st.tuples(calls, texts), min_size=1, max_size=3))
dialogues = st.tuples(texts, st.lists(turns, max_size=3), texts)


def protocol_of(tokenizer, **settings):
    schemas = [SEARCH, PLACE]
    return ChatProtocol(PromptTemplate(tokenizer, "Be brief.", tools=schemas), schemas=schemas, **settings)


PROTOCOLS = {
    "qwen3": protocol_of(qwen_tokenizer()),
    "qwen2": protocol_of(qwen_tokenizer(has_response_tags=False)),
    "qwen3 thinking": protocol_of(qwen_tokenizer(thought="'<think>\\nWell.\\n</think>\\n\\n'")),
    "llama": protocol_of(llama_tokenizer()),
}


@pytest.mark.parametrize("name", PROTOCOLS)
@given(dialogue=dialogues)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_tokens_of_a_dialogue_are_those_that_the_template_renders(name, dialogue):
    protocol = PROTOCOLS[name]
    question, process, answer = dialogue
    thought = "<think>\nWell.\n</think>\n\n" if "thinking" in name else ""
    messages = [{"role": "user", "content": question}]
    ids = list(protocol.template.render(question))
    for said, made in process:
        kept = made[:1] if protocol.frames.is_single else made
        content = "" if protocol.frames.is_single else said
        written = [call for call, _ in kept]
        shown = protocol.call_format.write(content, written)
        ids += [*protocol.encode_turn(thought + shown), protocol.frames.end_token]
        ids += protocol.encode_results([result for _, result in kept])
        messages.append(call_message(written, content=content))
        messages += result_messages([(call[0], result) for call, result in kept])
    ids += [*protocol.encode_turn(thought + answer), protocol.answer_end]
    messages.append({"role": "assistant", "content": answer})
    rendered = protocol.template.conversation(messages, has_header=False)
    whole = protocol.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert whole[: len(ids)] == ids
    assert not protocol.tokenizer.decode(whole[len(ids) :]).strip()


def test_each_template_takes_as_many_dialogues_as_are_claimed():
    assert EXAMPLES * len(PROTOCOLS) >= 1000
