"""Code that all programs share: argument parsers, and exit codes for users' mistakes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BAD_CONFIG


def program_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows `description` with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add a positional argument that takes configuration overrides.

    Overrides may follow an option only if the caller parses with `parse_intermixed_args`.
    """
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="section.field=value, or a YAML file; later ones win"
    )


def exit_code(work: Callable[[], int | None], *, out: str = "--out") -> int:
    """Run `work`, and return its result as an exit code. None means 0.

    After a ConfigError or OSError, print one line and return 2.

    Args:
        out: the option that says where the program writes. The line that reports an OSError names it.
    """
    try:
        return work() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        reason = error.strerror or error
        print(
            f"error: {out}: cannot write {error.filename or 'there'} ({reason}); choose another",
            file=sys.stderr,
        )
    return BAD_CONFIG
