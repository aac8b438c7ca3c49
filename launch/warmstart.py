"""Supervised warm start: teach a model the format from demonstrations, with the same Megatron code as RL.

    launch/local.sh -n RANKS --script launch/warmstart.py CONFIG [OPTION ...] [OVERRIDE ...]
    torchrun ... launch/warmstart.py --config CONFIG [OPTION ...] [OVERRIDE ...]
    srun ... python launch/warmstart.py --config CONFIG [OPTION ...] [OVERRIDE ...]

OPTION is --dry-run, --resume auto|none, --accept-changes, or --as-started FILE (see --help).
OVERRIDE is section.field=value or a YAML file. If two overrides set the same field, the later override wins.

The program trains the model at `warmstart.source` on the demonstrations in `warmstart.demonstrations`. It minimises
the mean cross-entropy of the tokens that the policy should write. By default, prompts and observations have no loss.
The program writes a Hugging Face checkpoint to `model.path`, and metrics and checkpoints to ROOT/NAME-warmstart/.
Except for rounding, the resulting model does not depend on the number of ranks. After a stop or a crash, the next
start resumes the warm start.
"""

from __future__ import annotations

import argparse
import os
import sys

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.launch.arguments import parse_start, start_parser
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage
from a2tgpo.lifecycle.stop_signal import StopSignal
from a2tgpo.run.job import keep, load_as_started
from a2tgpo.warmstart.target import require_target


def main() -> int:
    parser = start_parser(__doc__.splitlines()[0], resume="")
    args = parse_start(parser)
    stop_signal = StopSignal()
    try:
        join_launcher()
        is_first = os.environ.get("RANK", "0") == "0"
        config = load_as_started(args.as_started, args.config, args.overrides, is_reporter=is_first)
        require(args.resume in ("auto", "none"), "--resume", args.resume, "auto or none, for a warm start")
        require_target(config)
        if args.dry_run:
            from a2tgpo.launch.warm_start import dry_run

            return dry_run(config)
        return run(config, args, stop_signal=stop_signal)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error, is_ending=bool(stop_signal.name))


def run(config: RunConfig, args: argparse.Namespace, *, stop_signal: StopSignal) -> int:
    """Join the other ranks, build and resume the warm start, train, and write the model; return the exit code."""
    with lasting_objects():
        import torch.distributed as dist

        from a2tgpo.launch.warm_start import join_ranks
        from a2tgpo.lifecycle.stop_request import StopRequest
        from a2tgpo.lifecycle.watchdog import Watchdog
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.run.date import run_date
        from a2tgpo.warmstart.folder import WarmStartFolder
        from a2tgpo.warmstart.loop import WarmStart

    groups = join_ranks(config)
    folder = WarmStartFolder(config, groups)
    checkpoint = folder.open(args.resume, accept_changes=args.accept_changes)
    if args.as_started is not None and groups.rank == 0:
        keep(args.as_started, config)
    watchdog = Watchdog(
        config.watchdog, folder.path / "stacks", rank=groups.rank, world_size=groups.world_size
    )
    warm_start = WarmStart(
        config,
        groups,
        date=run_date(config, groups),
        checkpoint=checkpoint,
        folder=folder,
        stop=StopRequest(stop_signal, margin_s=config.checkpoint.margin_s),
        watchdog=watchdog,
    )
    try:
        stop_signal.begin_training()
        is_done = warm_start.train()
    finally:
        watchdog.close()
        warm_start.report.close()
    # A launcher ends the other ranks as soon as one rank exits with a code that is not 0.
    dist.barrier()
    shutdown()
    leave_garbage()
    return 0 if is_done else START_AGAIN


if __name__ == "__main__":
    sys.exit(main())
