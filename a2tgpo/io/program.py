"""Code that all programs share: create the argument parser, add the argument for overrides, and turn a user's mistake
into an exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG


def program_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows `description`, a program's docstring, with its line breaks unchanged."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add a positional argument that takes any number of configuration overrides.

    Parse with `parse_intermixed_args`; otherwise overrides that follow an option are rejected.
    """
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="section.field=value, or a YAML file; later ones win"
    )


def exit_code(work: Callable[[], int | None]) -> int:
    """Run `work` and return the exit code that it returns, or 0 if it returns None.

    If `work` raises ConfigError or OSError (a user's mistake or a failed write), print one line and return 2.
    """
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
