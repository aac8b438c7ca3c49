"""Train: the program that every rank of a run executes.

    launch/local.sh -n RANKS CONFIG [OPTION ...] [OVERRIDE ...]
    torchrun ... launch/train.py --config CONFIG [OPTION ...] [OVERRIDE ...]
    srun ... python launch/train.py --config CONFIG [OPTION ...] [OVERRIDE ...]

OPTION is --dry-run, --resume auto|PATH|none, --accept-changes, or --as-started FILE (see --help).
OVERRIDE is section.field=value or a YAML file, for example a method of configs/algorithm/. If two overrides set the
same field, the later override wins. Without a launcher, the run has one process.
"""

from __future__ import annotations

import argparse
import os
import sys

from a2tgpo.config.run import RunConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.io.exit_codes import BROKEN_RUN, START_AGAIN
from a2tgpo.launch.arguments import parse_start, start_parser
from a2tgpo.launch.needs import check_profiling, training_inputs
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage
from a2tgpo.lifecycle.stop_signal import StopSignal
from a2tgpo.run.job import keep, load_as_started


def main() -> int:
    parser = start_parser(__doc__.splitlines()[0], resume="PATH")
    args = parse_start(parser)
    stop_signal = StopSignal()
    try:
        join_launcher()
        is_first = os.environ.get("RANK", "0") == "0"
        config = load_as_started(args.as_started, args.config, args.overrides, is_reporter=is_first)
        if args.dry_run:
            from a2tgpo.launch.dry_run import dry_run

            return dry_run(config, resume=args.resume, accept_changes=args.accept_changes)
        return run(config, args, stop_signal=stop_signal)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error, is_ending=bool(stop_signal.name))


def run(config: RunConfig, args: argparse.Namespace, *, stop_signal: StopSignal) -> int:
    """Join the other ranks, build the run, resume it if it has a checkpoint, and train; return the exit code."""
    check_profiling(config.profile)  # before the imports, which take seconds

    with lasting_objects():
        import torch.distributed as dist

        from a2tgpo.assemble import assemble, build_checkpoints
        from a2tgpo.launch.preflight import start_ranks
        from a2tgpo.lifecycle.process_age import process_age_s
        from a2tgpo.lifecycle.stop_request import StopRequest
        from a2tgpo.lifecycle.watchdog import Watchdog
        from a2tgpo.metrics.guards import Guards
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.run import ending
        from a2tgpo.run.folder import RunFolder
        from a2tgpo.trainer import Trainer

    imported_s = process_age_s()
    groups = start_ranks(config, training_inputs(config, resume=args.resume))
    joined_s = process_age_s()
    folder = RunFolder(config, groups)
    checkpoint = folder.open(args.resume, accept_changes=args.accept_changes)
    if args.as_started is not None and groups.rank == 0:
        keep(args.as_started, config)
    watchdog = Watchdog(config.watchdog, folder.stacks, rank=groups.rank, world_size=groups.world_size)
    watchdog.enter("assemble")
    parts = assemble(config, groups, resume_from=checkpoint)
    algorithm = config.algorithm
    guards = Guards(config.guard, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
    checkpoints = build_checkpoints(parts, folder, guards)
    watchdog.enter("restore")
    with parts.phases.explain_shortage():
        step = checkpoints.restore(checkpoint, is_auto=args.resume == "auto")
    watchdog.enter("")
    recorder = folder.recorder(parts.tokenizer, step=step)
    outage = parts.rollout.outage
    watchdog.follow(outage)
    startup = {
        "time/startup_imports_s": imported_s,
        "time/startup_join_s": joined_s - imported_s,
        "time/startup_s": process_age_s(),
    }
    stop = StopRequest(stop_signal, margin_s=config.checkpoint.margin_s, outage=outage)
    trainer = Trainer(
        parts,
        recorder,
        checkpoints,
        guards,
        folder=folder,
        step=step,
        startup=parts.startup | startup,
        watchdog=watchdog,
        stop=stop,
    )
    num_steps, best = config.run.steps, checkpoints.best
    recorder.writer.print(f"{config.run.name}: step {step} of {num_steps} on {groups.world_size} ranks")
    code = 0
    try:
        stop_signal.begin_training()
        with parts.phases.explain_shortage():
            is_done = trainer.train()
        if is_done:
            recorder.writer.print(ending.finished(folder, best))
        elif stop.is_agreed:
            code = START_AGAIN
            line = ending.stopped(folder, trainer.step, num_steps=num_steps, reason=stop.reason)
            recorder.writer.print(line)
        else:
            code = BROKEN_RUN
            line = ending.alarmed(folder, best, trainer.step, num_steps=num_steps, guards=guards)
            recorder.writer.print(line)
    finally:
        watchdog.close()
        recorder.close()
    parts.close()
    # A launcher ends the other ranks as soon as one rank exits with a code that is not 0.
    dist.barrier()
    shutdown()
    leave_garbage()
    return code


if __name__ == "__main__":
    sys.exit(main())
