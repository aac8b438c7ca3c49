"""Read the records of a question file, which are lines of JSONL or rows of Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from a2tgpo.io.errors import ConfigError, first_line
from a2tgpo.io.json_lines import read_json_lines

_PARQUET = b"PAR1"
_BATCH_ROWS = 1024


def read_records(path: Path, *, key: str) -> Iterator[tuple[str, dict]]:
    """Yield (place, record) for every record, in file order. The place is `"FILE line N"` or `"FILE row N"`.

    The file is read as Parquet if it begins with Parquet's magic bytes or its name ends in .parquet. Null fields are
    left out (see `stated`).

    Args:
        key: the configuration key or option that names the file, for messages.

    Raises:
        ConfigError: with a one-line message, if the file cannot be read, or if a line is not a JSON object.
    """
    is_parquet = path.suffix == ".parquet" or _begins_as_parquet(path)
    for where, record in (_read_parquet if is_parquet else read_json_lines)(path, key=key):
        yield where, stated(record)


def stated(record: dict) -> dict:
    """Return `record` without its null fields. In Parquet files and in joined sets, a missing value is null."""
    return {name: value for name, value in record.items() if value is not None}


def _begins_as_parquet(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(len(_PARQUET)) == _PARQUET
    except OSError:
        return False  # the reader reports the error


def _read_parquet(path: Path, *, key: str) -> Iterator[tuple[str, dict]]:
    # Import pyarrow only here, because the import takes a third of a second.
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ConfigError(f"{key}: cannot read {path} ({reason:.120}); give an existing file") from None
    except Exception as error:  # pyarrow raises a different type for each kind of damage
        raise ConfigError(f"{key}: cannot read {path} as Parquet ({first_line(error):.120})") from None
