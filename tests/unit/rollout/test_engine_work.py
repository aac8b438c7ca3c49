"""The number of tokens that the real engine's scheduler computes, compared with the least possible number."""

import dataclasses
from collections import Counter

import pytest
import torch
from played import run, tags
from scripted_search import ScriptedSearch, toolset_of
from tiny_models import ANSWER, ASK, prompt_ids, teach_more
from transformers import AutoModelForCausalLM

from a2tgpo.config.rollout import GainConfig
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.trajectory import Prompt

NO_THOUGHT_IS_OPEN = " <answer> \\boxed{"
"""The default scaffold for the contexts of these scripts, in which no thought is open."""

BLOCK = 32
GROUP_SIZE = 4
QUERIES = ("one", "two", "three")
QUESTION = "la " * 240 + "?"
PASSAGE = "la " * 45
ALIASES = ("Paris", "King of Rome", "Lima")


@pytest.fixture(scope="module")
def asking_engine(engine, taught_path, tokenizer):
    """The engine with a model that searches three times after a prompt of 255 tokens, then answers."""
    observation = f" <result>\nDoc 1 (Title: {{}}) {PASSAGE}\n</result>"
    turns = [ASK.format(query) for query in QUERIES] + [ANSWER.format("Paris")]
    model = teach_more(taught_path, QUESTION, turns, observation.format("one"))
    engine.load_weights(model.state_dict().items(), version=1)
    yield engine
    old = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32)
    engine.load_weights(old.state_dict().items(), version=0)


@pytest.fixture(scope="module")
def computed(asking_engine):
    """The number of tokens that the scheduler had the model compute, by kind of request (turn or score)."""
    scheduler = asking_engine._engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule
    tokens = Counter()

    def counting(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for request_id, number in output.num_scheduled_tokens.items():
            tokens[request_id.partition("-")[0]] += number
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", counting)
        yield tokens


@pytest.fixture(scope="module")
def play(asking_engine, engine_config, tokenizer, computed):
    """Play one question from an empty cache. Return trajectories, counts and computed tokens by kind."""

    def play(**gain):
        config = dataclasses.replace(engine_config, gain=GainConfig(**gain), max_turn_tokens=64)
        rollout = GroupRollout(
            asking_engine,
            toolset_of(ScriptedSearch(text=PASSAGE)),
            tags(tokenizer, gain=config.gain),
            rollout=config,
        )
        prompt = Prompt(
            index=0,
            id="q",
            question=QUESTION,
            answers=ALIASES,
            tokens=tuple(prompt_ids(tokenizer, QUESTION)),
            hops=3,
        )
        computed.clear()
        assert asking_engine._engine.reset_prefix_cache()
        trajectories, counts = run(
            rollout, [prompt], seed=0, version=0, greedy=True, group_size=GROUP_SIZE, score_gain=bool(gain)
        )
        rollout.close()
        assert [len(t.turns) for t in trajectories] == [len(QUERIES) + 1] * GROUP_SIZE, "not as taught"
        return trajectories, counts, dict(computed)

    return play


@pytest.fixture(scope="module")
def unscored(play):
    """What `play` returns without scores."""
    return play()


def test_hardly_a_token_of_a_prefix_is_computed_twice(unscored):
    """Samples share the computed prompt, and a turn reuses the computed tokens of earlier turns."""
    trajectories, counts, computed = unscored
    returned = [
        sum(len(turn.tokens) + len(turn.observation_tokens) for turn in t.turns[:number])
        + len(t.prompt_tokens)
        for t in trajectories
        for number in range(1, len(t.turns))
    ]
    prompts = sum(len(t.prompt_tokens) for t in trajectories)
    prefixes = sum(returned) + prompts - len(trajectories[0].prompt_tokens)
    # The minimum is the prompt once, and the rest of each trajectory without its last sampled token.
    least = sum(t.num_tokens - 1 for t in trajectories) - prompts + len(trajectories[0].prompt_tokens)
    again = computed["turn"] - least
    assert set(computed) == {"turn"}
    assert again <= 0.05 * prefixes, (again, prefixes)
    assert counts.cached_prefix_tokens >= 0.95 * counts.known_prefix_tokens


@pytest.mark.parametrize("reduction", ["first", "max"])
def test_gain_costs_the_answers_tokens_and_an_unfilled_block_a_turn(play, unscored, tokenizer, reduction):
    """No full block of a prefix is computed for a score, and generation computes no more than without scores."""
    _, _, alone = unscored
    trajectories, counts, computed = play(answer_reduction=reduction)
    aliases = ALIASES if reduction == "max" else ALIASES[:1]
    scaffold = len(tokenizer(NO_THOUGHT_IS_OPEN, add_special_tokens=False)["input_ids"])
    per_context = sum(
        scaffold + len(tokenizer(alias, add_special_tokens=False)["input_ids"]) + BLOCK for alias in aliases
    )
    contexts = 1 + GROUP_SIZE * len(QUERIES)
    assert 0 < computed["score"] <= contexts * per_context
    assert computed["turn"] <= alone["turn"], "scoring made the engine forget"
    assert all(t.baseline_prob is not None for t in trajectories)
    assert counts.score_prompt_tokens - counts.score_cached_tokens == computed["score"], (
        "the counts are wrong"
    )
    assert all(turn.info_gain is not None for t in trajectories for turn in t.turns[:-1])


def test_a_score_takes_the_output_layer_at_the_answer(asking_engine, monkeypatch):
    """vLLM also runs the output layer for the one token that it always generates. One of vLLM's two runners also
    runs it for a block's uncached tokens.
    """
    (model,) = asking_engine._engine.collective_rpc(lambda worker: worker.model_runner.get_model())
    compute_logits, rows = model.compute_logits, []

    def counting(hidden_states, *args, **kwargs):
        rows.append(len(hidden_states))
        return compute_logits(hidden_states, *args, **kwargs)

    monkeypatch.setattr(model, "compute_logits", counting)
    prefix, answer = list(range(5, 5 + 10 * BLOCK)), [7, 8, 9]
    for _ in range(2):
        rows.clear()
        asking_engine.submit_score("score-x", prefix, answer)
        outputs = []
        while not outputs:
            outputs = asking_engine.step()
    on_gpus = asking_engine._engine.vllm_config.use_v2_model_runner
    assert len(answer) < sum(rows) <= len(answer) + 1 + (0 if on_gpus else BLOCK)
