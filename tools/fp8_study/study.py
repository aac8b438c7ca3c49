"""Measure how much FP8 changes log-probs and turn-mean log-ratios, compared with the noise of bfloat16.

    python tools/fp8_study/study.py MODEL TEXTS --out DIR [--sequences 16] [--sample TOKENS] [--drift 8e-6]

FP8 is emulated on a CPU. MODEL is a Hugging Face folder. TEXTS is a JSONL file. Its records are demonstrations
(`question`, and `turns` with `text` and `observation`), plain texts (`text`, which is one turn), or trajectories from
an unpacked file of RUN/rollouts/step_N/. With --sample N, the model writes one turn of N tokens after each prompt,
and the program measures these turns instead.

The program answers three questions, for whole turns and for turns cut into pieces of equal length:

rounding: How large is a format's error? This is log p in the format minus log p in float32, with equal weights.
gap: How far is an engine in FP8 from a trainer in bfloat16? This is log p in FP8 minus log p in bfloat16, with equal
    weights.
ratio: Which error remains if the trainer computes the old log-probs itself, in its training format? This is
    log(p_new / p_old) in the format minus log(p_new / p_old) in float32. A new weight is the old weight plus or minus
    `--drift` (a few learning rates) at random, rounded stochastically to bfloat16.

The program writes noise.csv, noise.json and noise.png to DIR. epsilon is the paper's clipping range of 3e-3 for
turn-mean log-ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a2tgpo.config.expand import text_argument
from a2tgpo.io.atomic_file import atomic_file, write_json
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.tables import write_csv


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        rows = study(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=text_argument, help="Hugging Face folder")
    parser.add_argument("texts", type=text_argument, help="JSONL of demonstrations, rollouts or texts")
    parser.add_argument(
        "--out", type=text_argument, required=True, help="folder for the table and the figure"
    )
    parser.add_argument("--sequences", type=int, default=16, help="number of lines of TEXTS to use")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="TOKENS", help="let the model write turns of this length"
    )
    parser.add_argument(
        "--drift", type=float, default=8e-6, help="movement of every weight; 8 updates at 1e-6"
    )
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the noise, write the files to `args.out`, and return the table's rows.

    Raises:
        ConfigError: with a one-line message, if the model or the texts cannot be read.
    """
    import torch
    from emulation import RECIPES
    from noise import EPSILON, measure, move_weights, noise_rows, read_sequences, written_by
    from transformers import AutoModelForCausalLM

    from a2tgpo.data.tokenizer import load_tokenizer
    from a2tgpo.model.hf_config import load_hf_config

    args.recipes = args.recipes or list(RECIPES)
    for name in args.recipes:
        require(name in RECIPES, "--recipes", name, " | ".join(RECIPES))
    load_hf_config(args.model)
    begin = time.process_time()
    tokenizer = load_tokenizer(args.model)
    sequences = read_sequences(args.texts, tokenizer, limit=args.sequences)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    # Load the model twice. Casting one model to bfloat16 and back would round its float32 rotary tables.
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.sample:
        sequences = written_by(model, sequences, args.sample, tokenizer, seed=args.seed)

    old = measure(model, exact, sequences, args.recipes)
    move_weights(model, args.drift, seed=args.seed)
    new = measure(model, exact, sequences, args.recipes)
    rows = noise_rows(old, new)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "noise.csv", rows)
    options = {key: value for key, value in vars(args).items() if key != "out"}
    about = {
        **options,
        "epsilon": EPSILON,
        "num_turns": sum(len(sequence.turns) for sequence in sequences),
        "num_tokens": sum(end - first for sequence in sequences for first, end in sequence.turns),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }
    write_json(out / "noise.json", {"study": about, "rows": rows})
    draw(rows, out / "noise.png")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a text table with columns of fixed width."""
    lines = [
        f"{'question':<9} {'format':<16} {'length':>6} {'count':>6} {'mean':>10} {'std':>9} {'p95 of | |':>10} "
        f"{'> epsilon':>9}"
    ]
    lines += [
        f"{row['question']:<9} {row['format']:<16} {row['length'] or 'turn':>6} {row['count']:>6} "
        f"{row['mean']:>+10.5f} {row['std']:>9.5f} {row['p95_abs']:>10.5f} {row['share_above_epsilon']:>9.0%}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the 95th percentile of |mean log-ratio| against the length of pieces, with one panel per question."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from noise import EPSILON, PIECES, WHOLE

    from a2tgpo.metrics.figure_style import MUTED, STAGE_COLORS, STYLE

    titles = {
        "rounding": "error of log p (against float32)",
        "gap": "gap between FP8 and bfloat16",
        "ratio": "error of the ratio (equal formats)",
    }
    formats = list(dict.fromkeys(row["format"] for row in rows))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
        for panel, (question, title) in zip(panels, titles.items(), strict=True):
            for name, color in zip(formats, STAGE_COLORS, strict=False):
                points = [
                    (row["length"], row["p95_abs"])
                    for row in rows
                    if (row["question"], row["format"]) == (question, name) and row["length"] != WHOLE
                ]
                if points:
                    dashed = ":" if name == "true ratio" else "-"
                    panel.plot(*zip(*points, strict=True), dashed, color=color, marker="o", ms=3, label=name)
            panel.axhline(EPSILON, color=MUTED, lw=1, ls="--")
            panel.text(1, EPSILON * 1.08, "epsilon = 3e-3", color=MUTED, fontsize=8)
            panel.set(title=title, xscale="log", yscale="log", xlabel="tokens averaged over")
            panel.set_xticks(PIECES, [str(length) for length in PIECES])
            panel.minorticks_off()
        panels[0].set_ylabel("95th percentile of |turn-mean log-ratio|, nats")
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper")
        with atomic_file(path) as stream:
            figure.savefig(stream, dpi=120, format="png")
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
