"""Build the argument parsers of the programs that a launcher starts."""

from __future__ import annotations

import argparse

from a2tgpo.config.expand import path_argument, text_argument
from a2tgpo.io.program import add_overrides, program_parser


def start_parser(description: str, *, resume: str) -> argparse.ArgumentParser:
    """Return a parser for the argument CONFIG, the options of a start, and the overrides.

    Args:
        resume: the help text's placeholder for values of --resume besides `auto` and `none`, e.g. PATH; "" if
            there are none.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that needs no model, then exit"
    )
    choices = "|".join(filter(None, ("auto", resume, "none")))
    parser.add_argument(
        "--resume",
        type=text_argument,
        default="auto",
        metavar=choices,
        help="auto: continue from the run's newest complete checkpoint, if any; none: start over",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue although settings, code or packages have changed since the last start",
    )
    parser.add_argument(
        "--as-started",
        type=path_argument,
        metavar="FILE",
        help="for a scheduler's job: stores the configuration of its first start, which later starts continue with; "
        "--resume and --accept-changes apply only to the first start",
    )
    add_overrides(parser)
    return parser


def saved_model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the argument CONFIG and for the option that names the saved model."""
    parser = program_parser(description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--checkpoint",
        type=text_argument,
        required=True,
        metavar="PATH",
        help="run's checkpoint or Hugging Face folder",
    )
    return parser


def parse_start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the parsed arguments of this start.

    A scheduler restarts a job with the arguments of the job's first start. Later starts therefore ignore `--resume`
    and `--accept-changes`, resume from the newest checkpoint and accept no changes.
    """
    args = parser.parse_intermixed_args()  # an override may follow an option
    if args.as_started is not None and args.as_started.exists():
        args.resume, args.accept_changes = "auto", False
    return args
