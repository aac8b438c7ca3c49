"""Estimate whether a configuration fits a cluster, how a step is divided, and how long it takes, without a GPU.

    python tools/plan.py CONFIG [OVERRIDE ...] [--gpus 64] [--gpu h100-80gb] [--model NAME] [--suggest] [--json FILE]
    python tools/plan.py CONFIG --passages 21015324 [--search-dim 768] [--search-cores 16]
    python tools/plan.py CONFIG --measured found.json

An OVERRIDE is section.field=value or a YAML file, as for training. Without --gpus and --gpu, the plan is for
cluster.gpus and cluster.gpu of CONFIG. --measured takes a file that tools/gpu_check.py --json wrote on the plan's
kind of GPU. The measurements in this file then replace assumptions of the plan, and each replacement is printed. The
exit code is 1 if a phase of the step does not fit in memory, or if --suggest finds no layout that fits. The exit code
is 2 if the configuration or the arguments are wrong.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from a2tgpo.config.expand import path_argument
from a2tgpo.config.load import load_config
from a2tgpo.io.atomic_file import write_json
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import add_overrides, exit_code
from a2tgpo.io.terminal import end_with_reader
from a2tgpo.plan.dimensions import KNOWN_MODELS, model_dimensions
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.layouts import suggest
from a2tgpo.plan.measured import calibrate, calibration_text
from a2tgpo.plan.plan import Plan, make_plan
from a2tgpo.plan.report import plan_json, plan_text, suggestion_text
from a2tgpo.plan.search_rate import flat_queries_per_s
from a2tgpo.plan.workload import Workload


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_intermixed_args(arguments)  # overrides may follow options
    return exit_code(lambda: plan(args))


def plan(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    dimensions, source = model_dimensions(config.model.path, args.model)
    gpu, gpus = GPUS[args.gpu or config.cluster.gpu], args.gpus or config.cluster.gpus
    workload = Workload(
        prompt_tokens=args.mean_prompt_tokens,
        response_tokens=args.mean_response_tokens,
        sampled_share=args.sampled_share,
    )
    calibration = assumed = None
    if args.measured:
        calibration = calibrate(args.measured, gpu, fp8_recipe=config.model.fp8.recipe)
        gpu, assumed = calibration.gpu, calibration.assumed
    if args.suggest:
        plans = suggest(config, dimensions, gpu, gpus=gpus, workload=workload, assumed=assumed)
        print(suggestion_text(plans))
        written: list | dict = [plan_json(made) for made in plans]
        is_possible = bool(plans)
    else:
        made = make_plan(config, dimensions, gpu, gpus=gpus, workload=workload, assumed=assumed)
        print(plan_text(made, source=source))
        if args.passages:
            print(f"\n{search_text(made, args)}")
        written = plan_json(made)
        is_possible = made.fits
    if calibration:
        print(f"\n{calibration_text(calibration)}")
    if args.json:
        try:
            write_json(args.json, written)
        except (OSError, ValueError) as error:  # ValueError: the name contains NUL
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--json: cannot write {args.json} ({reason}); choose another file") from None
    return 0 if is_possible else 1


def search_text(made: Plan, args: argparse.Namespace) -> str:
    """Return a sentence that compares a Flat index's queries/s on CPUs with the queries/s that the plan needs."""
    needed, cores = made.searches.per_second, args.search_cores
    found = flat_queries_per_s(passages=args.passages, dim=args.search_dim, cores=cores)
    verdict = "enough" if found >= needed else f"{needed / found:.1f} times too few"
    return (
        f"a Flat index of {args.passages:,} passages x {args.search_dim} on {cores} cores answers about {found:,.1f} "
        f"queries/s, {needed:,.1f} are needed: {verdict}; {math.ceil(cores * needed / found):,} cores, or GPUs, "
        "or an "
        "IVF index (docs/retrieval.md)"
    )


def build_parser() -> argparse.ArgumentParser:
    usual = Workload()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    add_overrides(parser)
    parser.add_argument("--gpus", type=_count, help="cards of the cluster (default: cluster.gpus)")
    parser.add_argument("--gpu", choices=list(GPUS), help="kind of card (default: cluster.gpu)")
    parser.add_argument(
        "--model",
        choices=list(KNOWN_MODELS),
        help="built-in dimensions, in place of model.path's config.json",
    )
    parser.add_argument(
        "--mean-prompt-tokens",
        type=_tokens,
        default=usual.prompt_tokens,
        help=f"expected prompt, tokens (default {usual.prompt_tokens:.0f})",
    )
    parser.add_argument(
        "--mean-response-tokens",
        type=_tokens,
        default=usual.response_tokens,
        help=f"expected response, observations included, tokens (default {usual.response_tokens:.0f})",
    )
    parser.add_argument(
        "--sampled-share",
        type=_share,
        default=usual.sampled_share,
        help=f"share of the response that the policy samples, in (0, 1] (default {usual.sampled_share:g})",
    )
    parser.add_argument(
        "--measured", metavar="FILE", help="JSON of tools/gpu_check.py, measured on such a card"
    )
    parser.add_argument(
        "--passages", type=_count, help="of a dense search index: predict its queries per second"
    )
    parser.add_argument(
        "--search-dim", type=_count, default=768, help="components of its vectors (default 768)"
    )
    parser.add_argument(
        "--search-cores", type=_count, default=16, help="CPU cores of its servers (default 16)"
    )
    parser.add_argument("--suggest", action="store_true", help="layouts that fit, fastest first")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the numbers to FILE")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer >= 1")
    return int(text)


def _tokens(text: str) -> float:
    if not 1 <= (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a finite number >= 1")
    return value


def _share(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number in (0, 1]")
    return value


def _number(text: str) -> float:
    """Return `text` as a number. Return NaN, which every caller rejects, if `text` is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
