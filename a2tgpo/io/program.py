"""What the programs share: a parser, the overrides of a configuration, the exit code of a user's mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG


def program_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a program's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the trailing overrides of a configuration; `parse_intermixed_args` lets them follow options."""
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="section.field=value, or a YAML file; later ones win"
    )


def exit_code(work: Callable[[], int | None]) -> int:
    """Return `work`'s exit code (0 for None), or 2 and print one line after a user's mistake or a failed write."""
    try:
        return work() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        reason = error.strerror or error
        print(
            f"error: --out: cannot write {error.filename or 'there'} ({reason}); choose another",
            file=sys.stderr,
        )
    return BAD_CONFIG
