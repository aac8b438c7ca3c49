"""Train: the program that every rank of a run executes.

    launch/local.sh -n RANKS CONFIG [OPTION ...] [OVERRIDE ...]
    torchrun ... launch/train.py --config CONFIG [OPTION ...] [OVERRIDE ...]
    srun ... python launch/train.py --config CONFIG [OPTION ...] [OVERRIDE ...]

OPTION is --dry-run, --resume auto|PATH|none, --accept-changes, or --as-started FILE (see --help).
OVERRIDE is section.field=value or a YAML file, such as a method of configs/algorithm/; later ones win.
Without a launcher, the run is one process.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from a2tgpo.config.check import ConfigError
from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.experiment.job import keep, load_as_started
from a2tgpo.experiment.rules import TRAINING
from a2tgpo.experiment.starts import require_same
from a2tgpo.stop_signal import EXIT_CODE, StopSignal
from launch.arguments import parse_start, start_parser
from launch.failure import BROKEN_RUN, DOES_NOT_FIT, exit_code
from launch.rendezvous import join_launcher
from launch.run_plan import plan_of_run
from launch.search_rate import search_shortfall


def main() -> int:
    parser = start_parser(__doc__.splitlines()[0], resume="PATH")
    args = parse_start(parser)
    stop_signal = StopSignal()
    try:
        join_launcher()
        is_first = os.environ.get("RANK", "0") == "0"
        config = load_as_started(args.as_started, args.config, args.overrides, tells=is_first)
        if args.dry_run:
            return dry_run(config, resume=args.resume, accept_changes=args.accept_changes)
        return run(config, args, stop_signal=stop_signal)
    except (ConfigError, RuntimeError, OSError) as error:
        return exit_code(error, is_ending=bool(stop_signal.name))


def inputs(config: RunConfig, *, resume: str) -> dict[str, str]:
    """Return the paths that every rank must be able to read, by configuration key."""
    paths = {"model.path": config.model.path, "data.train": config.data.train, "data.test": config.data.test}
    if "search" in config.tools.selected:
        if config.search.backend == "bm25":
            paths["search.corpus"] = config.search.corpus
        elif config.search.token_file:
            paths["search.token_file"] = config.search.token_file
    if resume not in ("auto", "none"):
        paths["--resume"] = resume
    return paths


def dry_run(config: RunConfig, *, resume: str, accept_changes: bool) -> int:
    """Print the resolved configuration and its plan; check files, layout and ranks, without building a model.

    Returns:
        The exit code: 0, or `DOES_NOT_FIT`.
    """
    from a2tgpo.data.question_set import load_questions
    from a2tgpo.data.sampler import PromptSampler
    from a2tgpo.data.template import PromptSet, PromptTemplate
    from a2tgpo.data.tokenizer import load_tokenizer
    from a2tgpo.environment.tool import build_tools
    from a2tgpo.model.hf_config import load_hf_config
    from a2tgpo.model.rope import check_positions
    from a2tgpo.model.transformer_config import check_layout
    from a2tgpo.plan.advice import faults
    from a2tgpo.plan.report import plan_text
    from a2tgpo.resume import check_resume, find_record, require_same_run, trained_so_far
    from a2tgpo.run_date import read_date

    check_resume(resume)
    config.check_training()
    folder = Path(config.run.root) / config.run.name
    if resume != "none" and (done := trained_so_far(folder)):
        require_same(folder, config, TRAINING, accept=accept_changes, done=done)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from a2tgpo.parallel.initialize import shutdown
        from launch.preflight import start_ranks

        start_ranks(config, inputs(config, resume=resume))
        shutdown()
    hf_config = load_hf_config(config.model.path)
    check_layout(hf_config, config.parallel, config.model.fp8)
    check_positions(config.model.path, hf_config, config.max_model_len)
    template = PromptTemplate(
        load_tokenizer(config.model.path),
        config.data.instructions,
        kwargs=config.data.chat_template_kwargs,
        date=read_date(folder),
    )
    limit = config.data.max_prompt_tokens
    prompts = {
        key: PromptSet(
            load_questions(getattr(config.data, key), key=f"data.{key}"), template, max_prompt_tokens=limit
        )
        for key in ("train", "test")
    }
    for of_set in prompts.values():
        of_set.check_lengths()
    sizes = {key: len(of_set) for key, of_set in prompts.items()}
    per_step = config.rollout.prompts_per_step
    sampler = PromptSampler(
        sizes["train"], per_step, config.run.seed, fingerprint=prompts["train"].fingerprint
    )
    if (found := find_record(config, resume)) is not None:
        require_same_run(*found, hf_config, sampler)
    config.rollout.partial.check_questions(sizes["train"], prompts_per_step=per_step)
    build_tools(config).close()
    # Without a launcher, plan for the configuration's cluster, so that a login node can check it.
    gpus = int(os.environ.get("WORLD_SIZE", config.cluster.gpus))
    plan, source, card = plan_of_run(config, num_gpus=gpus)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        print(dump_config(config), end="")
        for line in f"planned for {gpus} x {card}\n\n{plan_text(plan, source=source)}\n".splitlines():
            print(f"# {line}".rstrip())  # commented, so that the output can be read as a configuration
        print(
            f"# dry run: files and layout are fine; {sizes['train']} training and {sizes['test']} test questions"
        )
        if shortfall := search_shortfall(config, num_gpus=gpus)[0]:
            print(f"# warning: {shortfall}")
    if not plan.fits and is_first:
        first, *others = faults(plan)
        more = f" (and {len(others)} more, above)" if others else ""
        print(f"error: does not fit {gpus} x {plan.gpu.name}: {first}{more}", file=sys.stderr, flush=True)
    return 0 if plan.fits else DOES_NOT_FIT


def run(config: RunConfig, args: argparse.Namespace, *, stop_signal: StopSignal) -> int:
    """Join the other ranks, build, resume and train; return the program's exit code."""
    import torch.distributed as dist

    from a2tgpo.assemble import assemble
    from a2tgpo.metrics.guards import Guards
    from a2tgpo.metrics.process_age import process_age_s
    from a2tgpo.parallel.initialize import shutdown
    from a2tgpo.parallel.stop_request import StopRequest
    from a2tgpo.run_folder import RunFolder
    from a2tgpo.trainer import Trainer
    from a2tgpo.watchdog import Watchdog
    from launch.preflight import start_ranks

    imported_s = process_age_s()
    groups = start_ranks(config, inputs(config, resume=args.resume))
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
    watchdog.enter("restore")
    step = folder.restore(checkpoint, parts, guards)
    watchdog.enter("")
    recorder = folder.recorder(parts, step=step)
    outage = parts.rollout.outage
    watchdog.follow(outage)
    parts.startup.update(
        {
            "time/startup_imports_s": imported_s,
            "time/startup_join_s": joined_s - imported_s,
            "time/startup_s": process_age_s(),
        }
    )
    stop = StopRequest(stop_signal, margin_s=config.checkpoint.margin_s, outage=outage)
    trainer = Trainer(parts, recorder, folder, guards, step=step, watchdog=watchdog, stop=stop)
    recorder.writer.print(
        f"{config.run.name}: step {step} of {config.run.steps} on {groups.world_size} ranks"
    )
    code = 0
    try:
        stop_signal.begin_training()
        if trainer.train():
            folder.say_where(recorder)
        elif stop.is_agreed:
            code = EXIT_CODE
            folder.say_when_to_go_on(recorder, trainer.step, stop.reason)
        else:
            code = BROKEN_RUN
            folder.say_why_stopped(recorder, trainer.step, guards)
    finally:
        watchdog.close()
        recorder.close()
    parts.close()
    # A launcher ends the other ranks as soon as one exits with a code that is not 0.
    dist.barrier()
    shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
