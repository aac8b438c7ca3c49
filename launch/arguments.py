"""The arguments that training and warm start have in common."""

from __future__ import annotations

import argparse

from a2tgpo.config.expand import path_argument, text_argument


def start_parser(description: str, *, resume: str) -> argparse.ArgumentParser:
    """A parser of CONFIG, of how to start, and of overrides.

    Args:
        resume: what --resume takes besides auto and none, for the help; empty: nothing.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that needs no model, then stop"
    )
    choices = "|".join(filter(None, ("auto", resume, "none")))
    parser.add_argument(
        "--resume",
        type=text_argument,
        default="auto",
        metavar=choices,
        help="auto: from the run's newest complete checkpoint if there is one; none: anew",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on though settings, code or packages are not those of the last start",
    )
    parser.add_argument(
        "--as-started",
        type=path_argument,
        metavar="FILE",
        help="of a scheduler's job: keeps the configuration of its first start, which its later starts go on with; "
        "--resume and --accept-changes count at the first one only",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="section.field=value, or a YAML file such as configs/algorithm/grpo.yaml; later ones win",
    )
    return parser


def parse_start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of this start.

    A scheduler starts a job again with the arguments of its first start. `--resume` and `--accept-changes` are meant
    for that one: a later start goes on from the newest checkpoint, and accepts nothing.
    """
    args = parser.parse_intermixed_args()  # overrides may stand behind options
    if args.as_started is not None and args.as_started.exists():
        args.resume, args.accept_changes = "auto", False
    return args
