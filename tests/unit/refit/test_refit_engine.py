"""A running engine takes new weights, tied and untied. A transformers model stands in for the trainer."""

import pytest
import torch
from tiny_models import build_model, save_tiny

from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.refit.verify import probe_tokens, probe_tolerance, verify_refit

VOCAB = 512
CONFIG = RolloutConfig(kv_cache_gib=0.05, max_concurrent=8, dtype="float32")
KINDS = {"tied": ("llama", True), "untied": ("qwen3", False)}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(kind, tmp_path_factory):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    architecture, tied = KINDS[kind]
    path = save_tiny(tmp_path_factory.mktemp(kind), architecture, vocab_size=VOCAB, tied=tied)
    engine = VllmEngine(path, config=CONFIG, model_dtype="float32", max_model_len=256, seed=0)
    yield engine
    engine.close()


@pytest.fixture
def model_of(kind):
    architecture, tied = KINDS[kind]
    return lambda seed: build_model(architecture, vocab_size=VOCAB, tied=tied, seed=seed).eval()


def named_weights(model):
    """Return the weights as a trainer exports them, with tied embeddings only once."""
    tied = model.config.tie_word_embeddings
    return {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


def logprobs_of(model, tokens, *, num_ids=VOCAB):
    """Return the log-probs of all tokens but the first, over the first `num_ids` ids: [len(tokens) - 1]."""
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0, :, :num_ids].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def verify(engine, model, *, tolerance=1e-3, step=3):
    probe = probe_tokens(engine.num_token_ids, 64)
    return verify_refit(
        engine, probe, logprobs_of(model, probe), version=step, tolerance=tolerance, group=None
    )


def greedy(engine, tokens):
    engine.submit("g", tokens, max_tokens=12, seed=None, temperature=0.0, top_p=1.0, stop=[])
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs[0]


def test_three_refits_in_a_row_give_the_new_weights_each_time(engine, model_of):
    for version, seed in enumerate((1, 2, 3), start=1):
        model = model_of(seed)
        engine.load_weights(named_weights(model).items(), version=version)
        assert verify(engine, model).max < 1e-4
        assert engine.weight_version == version


def test_layers_are_built_anew_under_the_engines_configuration(engine, model_of):
    from vllm.config import get_current_vllm_config_or_none

    seen = []

    def weights():
        for item in named_weights(model_of(3)).items():
            seen.append(get_current_vllm_config_or_none())
            yield item

    engine.load_weights(weights(), version=3)
    assert seen and None not in seen


def test_the_engine_keeps_no_hold_of_the_trainers_tensors(engine, model_of):
    weights = {name: tensor.clone() for name, tensor in named_weights(model_of(4)).items()}
    engine.load_weights(weights.items(), version=4)
    for tensor in weights.values():
        tensor.zero_()
    assert verify(engine, model_of(4)).mean < 1e-3


def test_cached_prefixes_of_old_weights_are_not_used(engine, model_of):
    tokens = list(range(3, 103))
    engine.load_weights(named_weights(model_of(5)).items(), version=5)
    greedy(engine, tokens)
    assert greedy(engine, tokens).num_cached_tokens == 96
    model = model_of(6)
    engine.load_weights(named_weights(model).items(), version=6)
    output = greedy(engine, tokens)
    assert output.num_cached_tokens == 0
    # The tokens are sampled only from the tokenizer's ids, so their log-probs are over these ids.
    logprobs = logprobs_of(model, tokens + output.tokens, num_ids=engine.num_token_ids)
    expected = logprobs[-len(output.tokens) :]
    assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_a_corrupted_weight_stops_the_run_with_one_line(engine, model_of, name):
    model = model_of(7)
    weights = named_weights(model)
    weights[name] = weights[name] * 1.05
    engine.load_weights(weights.items(), version=7)
    with pytest.raises(
        RuntimeError, match=r"^refit after step 3: .* differ from the trainer's by [\d.e-]+ in the mean"
    ) as stop:
        verify(engine, model)
    assert "\n" not in str(stop.value)


def test_weights_of_one_layer_left_old_are_noticed(engine, model_of):
    engine.load_weights(named_weights(model_of(8)).items(), version=8)
    weights = named_weights(model_of(9))
    for name, tensor in named_weights(model_of(8)).items():
        if ".layers.0." in name:
            weights[name] = tensor
    engine.load_weights(weights.items(), version=9)
    with pytest.raises(RuntimeError, match="does not have the trained weights"):
        verify(engine, model_of(9))


def test_values_that_are_no_numbers_are_noticed(engine, model_of):
    model = model_of(10)
    weights = named_weights(model)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    engine.load_weights(weights.items(), version=10)
    with pytest.raises(RuntimeError, match="by inf in the mean"):
        verify(engine, model)
    # If the trainer's log-probs are also not numbers, the message does not blame the engine.
    model.load_state_dict(weights, strict=False)
    with pytest.raises(
        RuntimeError, match=r"^refit after step 0: the trainer's own .* safetensors of model\.path"
    ):
        verify(engine, model, step=0)
    with pytest.raises(RuntimeError, match=r"^refit after step 3: the trainer's own .* earlier checkpoint"):
        verify(engine, model)


def without(weights, name):
    return {n: t for n, t in weights.items() if n != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: without(w, "model.norm.weight"), r"^refit: the export lacks model.norm.weight$"),
        (lambda w: w | {"model.extra": torch.ones(2)}, r"^refit: the engine has no weight model.extra; "),
        (
            lambda w: w | {"model.norm.weight": torch.ones(63)},
            r"model.norm.weight is \[63\]; expected \[64\]$",
        ),
    ],
)
def test_an_export_that_does_not_fit_is_refused_and_a_whole_one_mends_it(engine, model_of, damage, message):
    model = model_of(11)
    with pytest.raises(RuntimeError, match=message):
        engine.load_weights(damage(named_weights(model)).items(), version=11)
    assert engine.needs_weights
    with pytest.raises(RuntimeError, match="its weights are incomplete"):
        greedy(engine, [5])
    engine.load_weights(named_weights(model).items(), version=11)
    assert verify(engine, model).max < 1e-4


def test_a_weight_handed_over_twice_is_refused(engine, model_of):
    weights = list(named_weights(model_of(12)).items())
    with pytest.raises(RuntimeError, match=r"was handed over twice$"):
        engine.load_weights([*weights, weights[0]], version=12)
    engine.load_weights(weights, version=12)


def test_weights_in_another_number_format_are_converted(engine, model_of):
    model = model_of(13)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in named_weights(model).items()}
    engine.load_weights(halves.items(), version=13)
    model.load_state_dict(halves, strict=False)
    model.tie_weights()
    assert verify(engine, model).mean < 1e-3


def test_probe_is_fixed_and_spread_over_the_vocabulary():
    probe = probe_tokens(1000, 64)
    assert probe == probe_tokens(1000, 64)
    assert len(set(probe)) > 55
    assert min(probe) < 100 and max(probe) in range(900, 1000)


def test_tolerance_is_that_of_the_less_exact_side_unless_configured():
    assert probe_tolerance(0.0, trainer_dtype="float32", engine_dtype="float32") == 1e-3
    assert probe_tolerance(0.0, trainer_dtype="float32", engine_dtype="bfloat16") == 0.15
    assert probe_tolerance(0.02, trainer_dtype="bfloat16", engine_dtype="bfloat16") == 0.02
    assert probe_tolerance(0.0, trainer_dtype="fp8", engine_dtype="bfloat16") == 0.8
