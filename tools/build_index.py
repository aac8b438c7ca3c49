"""Build a retrieval index over a corpus: BM25, or dense with FAISS.

    python tools/build_index.py bm25 --corpus FILE --out FOLDER [--part I/N]
    python tools/build_index.py dense --corpus FILE --out FOLDER --encoder FOLDER [--factory Flat]
        [--query-prefix "query: " --passage-prefix "passage: "] [--part I/N]

The corpus is JSONL in Search-R1's format (`id`, `contents`) and stays where it is; the index holds the place of every
passage in it and the corpus's fingerprint, which is checked when the index is loaded. --part builds one of N parts,
for as many servers (tools/retrieval_server.py --shards).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a2tgpo.config.check import ConfigError, require
from a2tgpo.config.expand import path_argument, text_argument
from a2tgpo.search.dense import EncoderSettings
from a2tgpo.search.index_folder import build_index


class Bars:
    """One progress bar after the other."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._label = ""

    def __call__(self, label: str, done: int, total: int) -> None:
        if label != self._label:
            self.close()
            self._label = label
            unit = {"unit": "B", "unit_scale": True} if label.startswith("reading") else {"unit": " passages"}
            self._bar = tqdm(total=total, desc=label, **unit)
        assert self._bar is not None
        self._bar.update(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def parse_part(text: str) -> tuple[int, int]:
    """(0, 4) for 0/4."""
    first, _, second = text.partition("/")
    good = first.isdecimal() and second.isdecimal() and int(first) < int(second)
    require(good, "--part", text, "I/N with 0 <= I < N")
    return int(first), int(second)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["bm25", "dense"])
    parser.add_argument("--corpus", type=path_argument, required=True)
    parser.add_argument(
        "--out", type=path_argument, required=True, help="folder of the index; must not exist"
    )
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only part I of N")
    parser.add_argument(
        "--encoder", type=text_argument, default="", help="dense: Hugging Face folder, such as e5-base-v2"
    )
    parser.add_argument("--factory", default="Flat", help="dense: FAISS's name of the index")
    parser.add_argument("--query-prefix", default="", help='dense: e5 wants "query: "')
    parser.add_argument("--passage-prefix", default="", help='dense: e5 wants "passage: "')
    parser.add_argument("--max-tokens", type=int, default=256, help="dense: longer passages are cut")
    args = parser.parse_args()
    bars = Bars()
    try:
        encoder = None
        if args.kind == "dense":
            require(bool(args.encoder), "--encoder", args.encoder, "a Hugging Face folder, with dense")
            require(args.max_tokens >= 8, "--max-tokens", args.max_tokens, ">= 8")
            encoder = EncoderSettings(
                path=args.encoder,
                query_prefix=args.query_prefix,
                passage_prefix=args.passage_prefix,
                max_tokens=args.max_tokens,
            )
        num_passages = build_index(
            args.corpus,
            args.out,
            encoder=encoder,
            factory=args.factory,
            part=parse_part(args.part),
            progress=bars,
        )
    except ConfigError as error:
        bars.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        bars.close()
        print(f"error: --out: cannot write {args.out} ({error.strerror or error})", file=sys.stderr)
        return 2
    bars.close()
    print(f"wrote {args.out}: {args.kind} over {num_passages} passages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
