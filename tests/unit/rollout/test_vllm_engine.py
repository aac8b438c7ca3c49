"""The engine compared with transformers on the same weights, in float32."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._inductor.config
from chat_models import qwen_tokenizer
from safetensors.torch import save_file
from tiny_models import build_model, build_tokenizer, save_tiny
from transformers import AutoModelForCausalLM

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.io.errors import ConfigError
from a2tgpo.protocol.formats.hermes import FORMAT as HERMES
from a2tgpo.rollout.engine_guest import inspect_here
from a2tgpo.rollout.engine_output import ScoreOutput

BLOCK = 32


def drain(engine):
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
    return outputs


def submit(engine, request_id, tokens, *, seed, max_tokens=24, temperature=1.0, stop=(), **settings):
    engine.submit(
        request_id,
        tokens,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        top_p=1.0,
        stop=stop,
        **settings,
    )


def random_tokens(rng, count, limit):
    return [rng.randrange(3, limit) for _ in range(count)]


def test_sampled_logprobs_equal_transformers(engine, reference):
    rng = random.Random(0)
    prompts = [random_tokens(rng, length, engine.num_token_ids) for length in (1, 7, 32, 70)]
    for i, prompt in enumerate(prompts):
        submit(engine, str(i), prompt, seed=i)
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        output = outputs[str(i)]
        expected = reference(prompt + output.tokens, num_ids=engine.num_token_ids)[-len(output.tokens) :]
        assert output.logprobs == pytest.approx(expected, abs=1e-4)


def test_logprobs_are_those_of_the_temperature_that_was_sampled_at(engine, reference):
    """Greedy sampling gives log-probs at temperature 1. A score in the same batch has temperature 1 and covers the
    whole vocabulary.
    """
    prompt, answer = list(range(5, 25)), [9, 8, 7]
    temperatures = {"hot": 1.7, "cool": 0.7, "plain": 1.0, "greedy": 0.0}
    for number, (name, temperature) in enumerate(temperatures.items()):
        submit(engine, name, prompt, seed=number if temperature else None, temperature=temperature)
    engine.submit_score("score", prompt, answer)
    outputs = drain(engine)
    assert outputs.pop("score").answer_logprobs == pytest.approx(reference(prompt + answer)[-3:], abs=1e-4)
    for name, output in outputs.items():
        sampled_at = dict(num_ids=engine.num_token_ids, temperature=temperatures[name] or 1.0)
        expected = reference(prompt + output.tokens, **sampled_at)[-len(output.tokens) :]
        assert output.logprobs == pytest.approx(expected, abs=1e-4), name


def test_entropies_are_those_of_the_likeliest_tokens_and_change_no_sample(engine, taught_path):
    prompt = list(range(5, 40))
    for name, count in (("plain", 0), ("measured", 10)):
        submit(engine, name, prompt, seed=3, temperature=1.7, top_logprobs=count)
    outputs = drain(engine)
    plain, measured = outputs["plain"], outputs["measured"]
    assert plain.entropies == [] and measured.tokens == plain.tokens
    assert measured.logprobs == pytest.approx(plain.logprobs, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(taught_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + plain.tokens])).logits[0, len(prompt) - 1 : -1]
    top = (logits[:, : engine.num_token_ids] / 1.7).log_softmax(-1).topk(10).values
    assert measured.entropies == pytest.approx((-top.exp() * top).sum(-1).tolist(), abs=1e-4)


@pytest.mark.parametrize("prefix_length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1])
def test_scores_equal_transformers_cold_hot_and_repeated(engine, reference, prefix_length):
    rng = random.Random(prefix_length)
    prefix = random_tokens(rng, prefix_length, engine.num_token_ids)
    answers = [random_tokens(rng, length, engine.num_token_ids) for length in (1, 6, BLOCK + 3)]
    expected = [reference(prefix + answer)[-len(answer) :] for answer in answers]
    for heat in ("cold", "hot", "repeated"):
        if heat == "hot":
            submit(engine, "fill", prefix, seed=1, max_tokens=2)
            drain(engine)
        for i, answer in enumerate(answers):
            engine.submit_score(str(i), prefix, answer)
        outputs = drain(engine)
        for i in range(len(answers)):
            assert outputs[str(i)].answer_logprobs == pytest.approx(expected[i], abs=1e-4), heat
    cached = [outputs[str(i)].num_cached_tokens for i in range(len(answers))]
    assert cached == [(prefix_length - 1) // BLOCK * BLOCK] * len(answers)


def test_scores_submitted_right_behind_the_generation_share_its_prefill(engine, reference):
    rng = random.Random(99)
    prefix = random_tokens(rng, 5 * BLOCK + 9, engine.num_token_ids)
    answers = [random_tokens(rng, 5, engine.num_token_ids) for _ in range(3)]
    submit(engine, "turn", prefix, seed=3)
    for i, answer in enumerate(answers):
        engine.submit_score(str(i), prefix, answer)
    outputs = drain(engine)
    turn = outputs.pop("turn")
    expected = reference(prefix + turn.tokens, num_ids=engine.num_token_ids)[-len(turn.tokens) :]
    assert turn.logprobs == pytest.approx(expected, abs=1e-4)
    for i, answer in enumerate(answers):
        output = outputs[str(i)]
        assert isinstance(output, ScoreOutput)
        assert output.answer_logprobs == pytest.approx(reference(prefix + answer)[-5:], abs=1e-4)
        assert output.num_cached_tokens == 5 * BLOCK


def test_sequence_logprobs_ignore_the_cache(engine, reference):
    tokens = random_tokens(random.Random(5), 3 * BLOCK, engine.num_token_ids)
    for _ in range(2):
        assert engine.sequence_logprobs(tokens) == pytest.approx(reference(tokens), abs=1e-4)


@pytest.fixture(scope="module")
def padded_path(tmp_path_factory):
    """A model with more ids than its tokenizer, and with generation settings like those of instruct models.

    Its tokenizer's class has the same name as in the R1 distillates of Llama.
    """
    path = tmp_path_factory.mktemp("padded")
    save_tiny(path, "mistral", vocab_size=640)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"})
    )
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 1.9, "max_new_tokens": 2}
    (path / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True, "min_p": 0.5}))
    return path


@pytest.fixture(scope="module")
def padded_engine(padded_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.1, max_concurrent=16, dtype="float32")
    engine = VllmEngine(str(padded_path), config=config, model_dtype="float32", max_model_len=64, seed=0)
    yield engine
    engine.close()


def test_padded_ids_are_never_sampled(padded_engine):
    engine = padded_engine
    assert engine.num_token_ids < 0.8 * engine.vocab_size, "a fifth of the random model's mass is padding"
    for i in range(16):
        submit(engine, str(i), [5 + i], seed=i, temperature=2.0)
    submit(engine, "greedy", [5], seed=None, temperature=0.0)
    outputs = drain(engine)
    sampled = [token for output in outputs.values() for token in output.tokens]
    assert len(sampled) > 200
    assert max(sampled) < engine.num_token_ids


def test_sampling_settings_of_generation_config_have_no_effect(padded_engine, padded_path):
    engine = padded_engine
    model = AutoModelForCausalLM.from_pretrained(padded_path, dtype=torch.float32).eval()
    for i in range(4):
        submit(engine, str(i), [5, 6, 7], seed=i)
    outputs = drain(engine)
    assert len({tuple(output.tokens) for output in outputs.values()}) == 4
    for output in outputs.values():
        assert len(output.tokens) > 2
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7, *output.tokens]])).logits[0, 2:-1, : engine.num_token_ids]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
        assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_texts_of_the_engine_are_those_of_the_trainers_tokenizer(padded_engine, padded_path):
    tokenizer = load_tokenizer(str(padded_path))
    text = "capital of France?\n\n </search> so"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "transformers' own choice drops the spaces"
    for i in range(4):
        submit(padded_engine, str(i), [5, 6, 7], seed=i, temperature=2.0)
    for output in drain(padded_engine).values():
        assert output.text == tokenizer.decode(output.tokens).rstrip("\ufffd")


def test_a_stop_token_ends_a_generation_and_stays_in_it(padded_engine):
    engine = padded_engine
    submit(engine, "free", [5], seed=3)
    free = drain(engine)["free"]
    end = next(i for i, token in enumerate(free.tokens) if i > 3 and token not in free.tokens[:i])
    submit(engine, "ended", [5], seed=3, stop_tokens=[free.tokens[end]])
    ended = drain(engine)["ended"]
    assert ended.tokens == free.tokens[: end + 1] and len(ended.logprobs) == len(ended.tokens)
    assert (ended.finish_reason, ended.stop_string) == ("stop", None)


def test_yarn_is_computed_as_transformers_does_from_the_listed_files_only(tmp_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    model = build_model("qwen2")
    # Qwen2.5's setting for long contexts, with small lengths so that it has an effect here.
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model.config.rope_parameters = rope
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    build_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_file({"base.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"in another format")
    (tmp_path / "params.json").write_text("{}")
    config = RolloutConfig(kv_cache_gib=0.1, max_concurrent=16, dtype="float32")
    engine = VllmEngine(str(tmp_path), config=config, model_dtype="float32", max_model_len=256, seed=0)
    tokens = random_tokens(random.Random(5), 200, engine.num_token_ids)
    found = engine.sequence_logprobs(tokens)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert found == pytest.approx(expected, abs=1e-4)
    # A refit expects exactly the weights of the listed files.
    engine.load_weights(reference.state_dict().items(), version=1)
    assert engine.sequence_logprobs(tokens) == pytest.approx(expected, abs=1e-4)
    engine.close()


def test_stop_string_stays_and_all_sampled_tokens_are_kept(engine, tokenizer):
    prompt = tokenizer("<|im_start|>user\ncapital of France?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    submit(engine, "a", prompt, seed=None, temperature=0.0, max_tokens=80, stop=["</search>", "</answer>"])
    output = drain(engine)["a"]
    assert output.text.endswith("capital of France </search>")
    assert (output.finish_reason, output.stop_string) == ("stop", "</search>")
    assert tokenizer.decode(output.tokens).startswith(output.text)
    assert len(output.tokens) == len(output.logprobs)


def test_a_context_that_leaves_no_room_is_refused_and_leaves_nothing_behind(engine):
    with pytest.raises(ConfigError, match=r"^length of the context of long is 1024; allowed: < 1024"):
        submit(engine, "long", [5] * 1024, seed=0)
    assert not engine.has_unfinished


def test_cache_too_small_for_one_sequence_is_refused_in_one_line(taught_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.001, dtype="float32")
    with pytest.raises(ConfigError, match=r"rollout.kv_cache_gib is 0.001; allowed: >= 0.0\d+") as refusal:
        VllmEngine(taught_path, config=config, model_dtype="float32", max_model_len=4096, seed=0)
    assert "\n" not in str(refusal.value)


def test_model_without_positions_for_the_length_is_refused_in_one_line(taught_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.5, dtype="float32")
    with pytest.raises(ConfigError, match=r"max_response_tokens is 9000, more than the model's") as refusal:
        VllmEngine(taught_path, config=config, model_dtype="float32", max_model_len=9000, seed=0)
    assert "\n" not in str(refusal.value)


def test_missing_model_is_refused_in_one_line(tmp_path):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.1)
    with pytest.raises(ConfigError, match=r"config.json is missing$"):
        VllmEngine(str(tmp_path), config=config, model_dtype="float32", max_model_len=64, seed=0)


def test_construction_leaves_generators_and_variables_alone(taught_path, engine_config, monkeypatch):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 3)

    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    engine = VllmEngine(taught_path, config=engine_config, model_dtype="float32", max_model_len=64, seed=0)
    assert draws() == expected
    assert os.environ["LOCAL_WORLD_SIZE"] == "7"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    assert torch._inductor.config.compile_threads == 3
    engine.close()


def test_a_models_class_is_inspected_without_another_process(monkeypatch):
    from vllm.model_executor.models import registry

    import a2tgpo.rollout.vllm_engine  # noqa: F401  # sets vLLM's variables

    name, parts = "Qwen3ForCausalLM", "vllm.model_executor.models.qwen3:Qwen3ForCausalLM"
    models = registry._ModelRegistry()
    models.register_model(name, parts)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: pytest.fail("another process"))
    inspect_here(models, [name, "UnknownForCausalLM"])
    assert models.models[name].inspect_model_cls().is_text_generation_model
    assert list(models.models) == [name]


def test_vllm_makes_no_texts_and_no_rows_of_log_probs_that_nobody_reads(engine, monkeypatch):
    made, finish = {}, engine._finish
    monkeypatch.setattr(
        engine, "_finish", lambda output: made.update({output.request_id: output}) or finish(output)
    )
    submit(engine, "turn", [5, 6, 7], seed=0, max_tokens=4)
    engine.submit_score("score", list(range(3, 40)), [5, 6])
    drain(engine)
    assert made["turn"].outputs[0].logprobs.decoded_tokens == [None] * len(made["turn"].outputs[0].token_ids)
    # vLLM's runner V2 returns the scored rows in another field.
    assert engine._has_second_runner or len(made["score"].prompt_logprobs.logprobs) == 2


def test_importing_vllm_leaves_the_trainers_compile_threads_alone():
    code = (
        "import os, a2tgpo.rollout.vllm_engine, torch._inductor.config as inductor;"
        "print(os.environ['TORCHINDUCTOR_COMPILE_THREADS'], inductor.compile_threads)"
    )
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["3", "3"], found.stdout + found.stderr


def test_a_sleeping_engine_takes_no_requests_until_both_parts_are_woken(engine):
    engine.sleep()
    with pytest.raises(AssertionError, match="asleep in the engine: kv_cache and weights"):
        submit(engine, "a", [5], seed=0)
    engine.wake("weights")
    with pytest.raises(AssertionError, match=r"asleep in the engine: kv_cache$"):
        submit(engine, "a", [5], seed=0)
    engine.wake("kv_cache")
    submit(engine, "a", [5], seed=0)
    assert len(drain(engine)["a"].tokens) > 0


WELL_FORMED = [
    [("search", {"query": "capital of France"})],
    [("search", {"query": 'the "old" town \\ 東京\n'}), ("place", {"name": "b", "limit": 3, "deep": None})],
    [("a", {}), ("b", {"x": [1, 2.5, {"y": True}]}), ("c", {"z": ""})],
]


@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("calls", WELL_FORMED)
def test_calls_are_read_as_vllms_own_parser_reads_them(calls, text):
    from vllm.tool_parsers import ToolParserManager

    written = HERMES.write(text, calls)
    parser = ToolParserManager.get_tool_parser("hermes")(qwen_tokenizer())
    theirs = parser.extract_tool_calls(written, None)
    assert [(call.function.name, json.loads(call.function.arguments)) for call in theirs.tool_calls] == calls
    assert [(call.name, call.arguments) for call in HERMES.find_calls(written)] == calls
