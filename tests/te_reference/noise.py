"""FP8's error of log p by Transformer Engine's modules and by the emulation, on the same texts (docs/fp8.md).

    env NVTE_PROJECT_BUILDING=1 NVTE_TORCH_COMPILE=0 TORCHDYNAMO_DISABLE=1 TRITON_INTERPRET=1 PYTHONPATH=.:tests \\
        .venv-py312/bin/python tests/te_reference/noise.py MODEL TEXTS [--sequences 10] [--sample 128]

Arguments as in tools/fp8_study.py. The variables are `te_reference.ENVIRONMENT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import te_reference

te_reference.install()

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2tgpo.batch.packing import pack
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.model.build import build_policy
from a2tgpo.parallel.initialize import initialize, shutdown
from a2tgpo.trajectory import Trajectory, Turn
from a2tgpo.update.score import score
from tools.fp8_emulation import RECIPES, emulated
from tools.fp8_study import Written, piece_means, read_sequences, statistics, turn_logprobs, written_by

LENGTHS = (1, 32, 128)
FORMATS = {"bfloat16": None, "e4m3-tensorwise": "tensorwise", "e4m3-blockwise": "blockwise"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--sample", type=int, default=128)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = read_sequences(args.texts, tokenizer, limit=args.sequences)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    sequences = written_by(model, sequences, args.sample, tokenizer, seed=0)
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).float().eval()
    truth = turn_logprobs(exact, sequences)
    groups = initialize(ParallelConfig(), seed=0)
    for name, recipe in FORMATS.items():
        if recipe is None:
            _tell(name, "transformers", turn_logprobs(model, sequences), truth)
        else:
            with emulated(model.get_decoder(), RECIPES[name]):
                _tell(name, "emulation", turn_logprobs(model, sequences), truth)
        _tell(name, "modules", _by_modules(args.model, recipe, sequences, groups), truth)
    shutdown()


def _by_modules(
    path: str, recipe: str | None, sequences: Sequence[Written], groups: Any
) -> list[list[Tensor]]:
    """By sequence, by turn: [tokens] float64, as the trainer scores."""
    fp8 = Fp8Config() if recipe is None else Fp8Config(format="e4m3", recipe=recipe)
    config = ModelConfig(path=path, layer_spec="transformer_engine", fp8=fp8)
    policy = build_policy(config, ParallelConfig(), groups, update=None, trainable=False)
    batches = [pack([_trajectory(sequence)], [0], align=policy.alignment) for sequence in sequences]
    found = zip(batches, score(policy, batches), strict=True)
    return [[scored.logprobs[batch.loss_mask[0]].double()] for batch, scored in found if scored]


def _trajectory(sequence: Written) -> Trajectory:
    ((first, end),) = sequence.turns
    turn = Turn(tokens=sequence.tokens[first:end], rollout_logprobs=[0.0] * (end - first))
    return Trajectory(
        prompt_index=0,
        prompt_id="0",
        sample_index=0,
        prompt_tokens=sequence.tokens[:first],
        turns=[turn],
        stop_reason="answer",
    )


def _tell(name: str, by: str, found: list[list[Tensor]], truth: list[list[Tensor]]) -> None:
    differences = [[a - b for a, b in zip(*turns, strict=True)] for turns in zip(found, truth, strict=True)]
    for length in LENGTHS:
        values = statistics(piece_means(differences, length))
        print(
            f"{name} {by} {length}: mean {values['mean']:+.3f} std {values['std']:.3f} p95 {values['p95_abs']:.3f}"
        )


if __name__ == "__main__":
    main()
