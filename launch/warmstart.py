"""Supervised warm start: teach a model the format from demonstrations, through the same Megatron path as RL.

    launch/local.sh -n RANKS --script launch/warmstart.py CONFIG [OPTION ...] [OVERRIDE ...]
    torchrun ... launch/warmstart.py --config CONFIG [OPTION ...] [OVERRIDE ...]
    srun ... python launch/warmstart.py --config CONFIG [OPTION ...] [OVERRIDE ...]

OPTION is --dry-run, --resume auto|none, --accept-changes, or --as-started FILE (see --help).
OVERRIDE is section.field=value or a YAML file; later ones win.
Reads `warmstart.source` and `warmstart.demonstrations`, minimises the mean cross-entropy of the tokens that the
policy should write (prompts and observations carry no loss by default), and writes a Hugging Face checkpoint
to `model.path`, where training finds it. Each step's demonstrations do not depend on the number of ranks, so the
result is the same up to rounding. Metrics and checkpoints go to ROOT/NAME-warmstart/. After a stop or a crash, the
next start resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from a2tgpo.config.check import ConfigError, require
from a2tgpo.config.run import RunConfig
from a2tgpo.experiment.job import keep, load_as_started
from a2tgpo.stop_signal import EXIT_CODE, StopSignal
from a2tgpo.warmstart.target import folder_of, require_target, target_of
from launch.arguments import parse_start, start_parser
from launch.failure import DOES_NOT_FIT, exit_code
from launch.rendezvous import join_launcher

if TYPE_CHECKING:
    from a2tgpo.parallel.groups import ParallelGroups


def main() -> int:
    parser = start_parser(__doc__.splitlines()[0], resume="")
    args = parse_start(parser)
    stop_signal = StopSignal()
    try:
        join_launcher()
        is_first = os.environ.get("RANK", "0") == "0"
        config = load_as_started(args.as_started, args.config, args.overrides, tells=is_first)
        require(args.resume in ("auto", "none"), "--resume", args.resume, "auto or none, for a warm start")
        require_target(config)
        if args.dry_run:
            return dry_run(config)
        return run(config, args, stop_signal=stop_signal)
    except (ConfigError, RuntimeError, OSError) as error:
        return exit_code(error, is_ending=bool(stop_signal.name))


def dry_run(config: RunConfig) -> int:
    """Check target, demonstrations, layout and plan without building a model, as one process.

    Returns:
        The exit code: 0, or `DOES_NOT_FIT`.
    """
    from a2tgpo.config.load import dump_config
    from a2tgpo.data.template import today
    from a2tgpo.model.hf_config import load_hf_config
    from a2tgpo.model.transformer_config import check_layout
    from a2tgpo.run_date import read_date
    from a2tgpo.warmstart.examples import load_examples
    from a2tgpo.warmstart.settings import as_planned, learning_rate, source_dimensions
    from launch.run_plan import plan_of_run

    date = read_date(Path(config.run.root) / config.run.name) or today()
    examples = load_examples(config, date=date)
    lr = learning_rate(config, source_dimensions(config))
    planned = as_planned(config, lr=lr)
    check_layout(load_hf_config(planned.model.path), planned.parallel, planned.model.fp8)
    gpus = int(os.environ.get("WORLD_SIZE", config.cluster.gpus))
    plan, _, card = plan_of_run(planned, num_gpus=gpus)
    update = next(phase for phase in plan.phases if phase.name == "update")
    if os.environ.get("RANK", "0") == "0":
        print(dump_config(config), end="")
        print(
            f"# dry run: {len(examples.trained)} demonstrations, {len(examples.held_out)} held out; peak learning "
            f"rate {lr:.3g}\n# planned for {gpus} x {card}: the update takes {update.peak / 2**30:.1f} of "
            f"{update.capacity / 2**30:.1f} GiB"
        )
        if not update.fits:
            print(f"error: does not fit {gpus} x {plan.gpu.name}", file=sys.stderr, flush=True)
    return 0 if update.fits else DOES_NOT_FIT


def run(config: RunConfig, args: argparse.Namespace, *, stop_signal: StopSignal) -> int:
    """Join the other ranks, build, resume, train and write; return the program's exit code."""
    import torch.distributed as dist

    from a2tgpo.parallel.initialize import shutdown
    from a2tgpo.parallel.stop_request import StopRequest
    from a2tgpo.run_date import run_date
    from a2tgpo.warmstart.folder import WarmStartFolder
    from a2tgpo.warmstart.loop import WarmStart
    from a2tgpo.watchdog import Watchdog

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
    # A launcher ends the other ranks as soon as one exits with a code that is not 0.
    dist.barrier()
    shutdown()
    return 0 if is_done else EXIT_CODE


def join_ranks(config: RunConfig) -> ParallelGroups:
    """Check that the machines meet a warm start's needs, and join the ranks; every rank must call this."""
    from a2tgpo.warmstart.settings import as_planned, learning_rate, source_dimensions
    from launch.needs import warm_start_needs
    from launch.preflight import start_ranks

    settings = config.warmstart
    paths = {"warmstart.source": settings.source, "warmstart.demonstrations": settings.demonstrations}
    planned = as_planned(config, lr=learning_rate(config, source_dimensions(config)))
    needs = warm_start_needs(planned, target=target_of(config), root=folder_of(config))
    return start_ranks(planned, paths, needs)


if __name__ == "__main__":
    sys.exit(main())
