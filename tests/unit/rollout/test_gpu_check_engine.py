"""The engine checks of tools/gpu_check.py, on the engine of this folder."""

from gpu_checks.engine import Play, play_on, prefill, write_engine_slice
from gpu_checks.models import STAND_IN, slice_dimensions


def test_the_same_play_gives_the_same_tokens_though_the_second_finds_more_cached(engine):
    asked = Play(path="", dtype="float32", cache_gib=0.1, sequences=4, tokens=12)
    first, second = play_on(engine, asked), play_on(engine, asked)
    assert first.tokens == second.tokens
    assert set(first.tokens) == {"alone", *(f"{number}.{turn}" for number in range(4) for turn in (1, 2))}
    assert all(1 <= len(tokens) <= 12 for tokens in first.tokens.values())
    # Log-probs of sampled tokens are only over the tokenizer's ids, but those of whole sequences are over all ids.
    assert 0 < first.rescored_gap == second.rescored_gap < 0.01
    assert min(first.alone_s, first.together_s, first.tokens_per_s) > 0


def test_prefill_counts_the_operations_of_the_prompts(tmp_path):
    dimensions = slice_dimensions(None, tensor=8, layers=2, on_gpu=False)
    path = write_engine_slice(tmp_path / "slice", dimensions)
    rate, note = prefill((path, dimensions))
    assert STAND_IN.ffn // 8 == dimensions.ffn == 464
    assert rate > 0 and note.startswith("2 prompts of 256 tokens in ")
