"""Build a retrieval index over a corpus: either a BM25 index or a dense index with FAISS.

    python tools/build_index.py bm25 --corpus FILE --out FOLDER [--part I/N]
    python tools/build_index.py dense --corpus FILE --out FOLDER --encoder FOLDER [--factory Flat] [--workers N]
        [--query-prefix "query: " --passage-prefix "passage: "] [--part I/N]
    python tools/build_index.py dense --corpus FILE --out FOLDER --encoder FOLDER --from-faiss FILE ...

The corpus is JSONL in Search-R1's format (`id`, `contents`). The index stores each passage's position in the corpus
file, and a fingerprint of the corpus, which every load checks. --part I/N builds the index of part I of the corpus,
for a server of that part (tools/retrieval_server.py --shards).

Embeddings are kept in FOLDER.embeddings until the index is written, so the same command resumes an interrupted build.
--workers N starts N embedding processes on this machine and assigns the GPUs to them in turn. With --worker I/N this
process is number I of N embedding processes, which you start yourself on any machines that see the folder. These
processes end when all passages are embedded. Then run the command without --worker to write the index. --from-faiss
takes an existing FAISS index over the corpus, such as Search-R1's e5_Flat.index.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from tqdm import tqdm

from a2tgpo.config.expand import path_argument, text_argument
from a2tgpo.io.errors import require
from a2tgpo.io.program import exit_code, program_parser
from a2tgpo.search.encoder import DTYPES, EncoderSettings
from a2tgpo.search.index_build import DenseBuild, DenseRecipe, build_bm25, import_faiss

POLL_S = 1.0
"""Seconds between two checks of how many passages the other processes have embedded."""


class Bars:
    """A progress bar for one activity at a time. A new label starts a new bar."""

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


def parse_part(text: str, option: str = "--part") -> tuple[int, int]:
    """Return I and N of the text "I/N"."""
    first, _, second = text.partition("/")
    good = first.isdecimal() and second.isdecimal() and int(first) < int(second)
    require(good, option, text, "I/N with 0 <= I < N")
    return int(first), int(second)


def main() -> int:
    args = parse_arguments()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    bars = Bars()
    try:
        text = build(args, bars)
    finally:
        bars.close()
    print(text)


def parse_arguments() -> argparse.Namespace:
    parser = program_parser(__doc__)
    parser.add_argument("kind", choices=["bm25", "dense"])
    parser.add_argument("--corpus", type=path_argument, required=True)
    parser.add_argument(
        "--out", type=path_argument, required=True, help="folder of the index; must not exist"
    )
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only part I of N")
    dense = parser.add_argument_group("dense")
    dense.add_argument(
        "--encoder", type=text_argument, default="", help="Hugging Face folder, such as e5-base-v2"
    )
    dense.add_argument("--factory", default="Flat", help="FAISS's name of the index")
    dense.add_argument(
        "--nprobe", type=int, default=0, help="lists searched per query; 0: a 16th of them, at least 16"
    )
    dense.add_argument("--query-prefix", default="", help='e5 needs "query: "')
    dense.add_argument("--passage-prefix", default="", help='e5 needs "passage: "')
    dense.add_argument("--max-tokens", type=int, default=256, help="longer passages are cut")
    dense.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    dense.add_argument("--workers", type=int, default=0, help="processes; 0: one per GPU, or one")
    dense.add_argument("--worker", default="", metavar="I/N", help="only embed, as one of N processes")
    dense.add_argument(
        "--from-faiss", type=path_argument, metavar="FILE", help="a FAISS index over the whole corpus"
    )
    return parser.parse_args()


def build(args: argparse.Namespace, bars: Bars) -> str:
    """Build the index that the options describe, and return a line that says what was written.

    Raises:
        ConfigError: with a one-line message, if an option, the corpus or the encoder cannot be used.
    """
    part = parse_part(args.part)
    if args.kind == "bm25":
        num_passages = build_bm25(args.corpus, args.out, part=part, progress=bars)
        return f"wrote {args.out}: bm25 over {num_passages} passages"
    require(bool(args.encoder), "--encoder", args.encoder, "a Hugging Face folder, with dense")
    require(args.max_tokens >= 8, "--max-tokens", args.max_tokens, ">= 8")
    require(args.nprobe >= 0, "--nprobe", args.nprobe, ">= 0")
    require(args.workers >= 0, "--workers", args.workers, ">= 0")
    encoder = EncoderSettings(
        path=args.encoder,
        query_prefix=args.query_prefix,
        passage_prefix=args.passage_prefix,
        max_tokens=args.max_tokens,
    )
    recipe = DenseRecipe(encoder=encoder, factory=args.factory, nprobe=args.nprobe, dtype=args.dtype)
    if args.from_faiss:
        require(part == (0, 1), "--part", args.part, "0/1 with --from-faiss, which is over the whole corpus")
        num_passages = import_faiss(args.from_faiss, args.corpus, args.out, recipe, progress=bars)
        return f"wrote {args.out}: dense over {num_passages} passages, from {args.from_faiss}"
    if not args.worker:
        use_all_cpus()
    dense = DenseBuild(args.corpus, args.out, recipe, part=part, progress=bars)
    if args.worker:
        worker, num_workers = parse_part(args.worker, "--worker")
        dense.embed(worker=worker, num_workers=num_workers)
        return (
            f"embedded {dense.blocks.num_passages} passages; without --worker the command writes {args.out}"
        )
    num_workers = args.workers or num_gpus()
    if num_workers > 1:
        embed_in_processes(dense, num_workers, bars)
    dense.embed()
    return f"wrote {args.out}: dense over {dense.finish()} passages"


def use_all_cpus() -> None:
    """Let torch and FAISS use all CPUs, although jobs set OMP_NUM_THREADS to a small number for their ranks."""
    import faiss
    import torch

    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(cpus)
    faiss.omp_set_num_threads(cpus)


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def embed_in_processes(dense: DenseBuild, num_workers: int, bars: Bars) -> None:
    """Embed the passages in `num_workers` processes, and wait until all processes have ended."""
    cpus, gpus = len(os.sched_getaffinity(0)), num_gpus()
    processes = []
    # Schedulers end a job with SIGTERM. Exit then, so that the `finally` below ends the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for worker in range(num_workers):
            variables = os.environ | {"OMP_NUM_THREADS": str(max(1, cpus // num_workers))}
            if gpus:
                variables["CUDA_VISIBLE_DEVICES"] = visible_gpu(worker % gpus)
            command = [sys.executable, *sys.argv, "--worker", f"{worker}/{num_workers}"]
            processes.append(
                subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        total, shown = dense.blocks.num_passages, 0
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            done = dense.blocks.num_done
            bars("embedding", done - shown, total)
            shown = done
        bars("embedding", -shown, total)  # reset the bar: the caller's own loop counts all passages again
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def visible_gpu(number: int) -> str:
    """Return the name that CUDA_VISIBLE_DEVICES gives to the GPU that torch calls `cuda:number`."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return names.split(",")[number] if names else str(number)


if __name__ == "__main__":
    sys.exit(main())
