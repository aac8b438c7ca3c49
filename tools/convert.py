"""Convert a run's checkpoint to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

    python tools/convert.py megatron-to-hf --in RUN/checkpoints/step_N --out FOLDER [--config CONFIG] [OVERRIDE ...]
    python tools/convert.py hf-to-megatron --in FOLDER --out CHECKPOINTS --config CONFIG [OVERRIDE ...]
    launch/local.sh -n RANKS --script tools/convert.py CONFIG megatron-to-hf --in ... --out ...

megatron-to-hf also writes agent.json into the folder: the settings with which tools/serve.py and tools/chat.py play
the agent.

The conversion reads architecture and tokenizer from `model.path` of the run's configuration. The default of --config
is the configuration in the run folder that contains the checkpoint. hf-to-megatron writes CHECKPOINTS/step_0 with a
new optimizer. To start a run from this checkpoint, use `--resume CHECKPOINTS/step_0`. The processes of the conversion
divide the model among themselves. Settings such as `parallel.tensor=N` change this division.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from a2tgpo.config.expand import path_argument
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import add_overrides, program_parser
from a2tgpo.launch.preflight import meet_ranks
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage

DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")


def main() -> int:
    args = parse_arguments()
    try:
        join_launcher()
        if args.direction == "megatron-to-hf":
            export(args)
        else:
            import_hf(args)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = program_parser(__doc__)
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument(
        "--in",
        dest="source",
        type=path_argument,
        required=True,
        help="checkpoint or Hugging Face folder to read",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to write; must not exist")
    parser.add_argument("--config", help="YAML file of the run; default: the one beside the checkpoint")
    add_overrides(parser)
    return parser.parse_intermixed_args()


def config_beside(source: Path) -> Path:
    """Return the path RUN/config.yaml for a checkpoint RUN/checkpoints/step_N. Raise ConfigError if it is missing."""
    path = source.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"--config is missing, and {path} does not exist; give the run's YAML file")
    return path


def require_new(out: Path) -> None:
    require(not out.exists(), "--out", str(out), "a folder that does not exist yet")


def export(args: argparse.Namespace) -> None:
    """Convert a checkpoint to a Hugging Face folder. Every rank must call this."""
    with lasting_objects():
        from a2tgpo.config.load import load_config
        from a2tgpo.model.inference_layout import UNDIVIDED
        from a2tgpo.model.weights import save_hf
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.serve.agent_file import write_agent_file
        from a2tgpo.serve.player import load_policy, load_saved

    source, out = args.source, args.out
    file = args.config or config_beside(source)
    config, model = load_saved(file, args.overrides, source, key="--in")
    require(not model.is_hf, "--in", str(source), "a run's checkpoint, with megatron-to-hf")
    require_new(out)
    groups = meet_ranks(config)
    save_hf(load_policy(config, groups, model), str(out), chat_template=config.data.chat_template)
    if groups.rank == 0:
        # `config` has the layout of this conversion's processes. Other processes will play the agent, so write the
        # settings without a layout.
        write_agent_file(out, load_config(file, [*UNDIVIDED, *args.overrides]))
        print(f"wrote {out}: the weights of {model.path} as a Hugging Face model", flush=True)
    shutdown()
    leave_garbage()


def import_hf(args: argparse.Namespace) -> None:
    """Convert a Hugging Face folder to a checkpoint for step 0. Every rank must call this."""
    with lasting_objects():
        from a2tgpo.checkpoint.writer import CheckpointWriter
        from a2tgpo.model.build import build_policy
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.serve.player import load_saved
        from a2tgpo.update.optimizer import build_optimizer

    source, out = args.source, args.out
    config, model = load_saved(args.config or config_beside(source), args.overrides, source, key="--in")
    require(model.is_hf, "--in", str(source), "a Hugging Face folder, with hf-to-megatron")
    # A run with adapters saves only the adapters, so its checkpoint would not contain the model in `source`.
    rule = "0 with hf-to-megatron; set model.path to the folder, and start the run without a checkpoint"
    require(not config.model.lora.enabled, "model.lora.rank", config.model.lora.rank, rule)
    require_new(out)
    groups = meet_ranks(config)
    settings = dataclasses.replace(config.model, path=str(source))
    policy = build_policy(settings, config.parallel, groups, update=config.update)
    minibatches = config.rollout.prompts_per_step // config.update.prompts_per_minibatch
    optimizer, schedule = build_optimizer(policy, config.update, total_steps=config.run.steps * minibatches)
    writer = CheckpointWriter(out, timeout_s=config.parallel.timeout_s)
    writer.start(
        0, policy=policy, optimizer=optimizer, schedule=schedule, state={"step": 0}, on_complete=lambda: None
    )
    fault = writer.wait()
    if fault:
        if groups.rank == 0:
            with contextlib.suppress(OSError):
                out.rmdir()  # the writer has already removed the partial folder in `out`
        raise RuntimeError(f"--out: {out} could not be written: {fault}")
    path = out / "step_0"
    if groups.rank == 0:
        print(f"wrote {path}: start a run from it with --resume {path}", flush=True)
    shutdown()
    leave_garbage()


if __name__ == "__main__":
    sys.exit(main())
