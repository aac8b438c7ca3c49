"""Check a warm start, either in a dry run or before the warm start begins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.template import today
from a2tgpo.io.exit_codes import DOES_NOT_FIT
from a2tgpo.launch.needs import warm_start_needs
from a2tgpo.launch.preflight import start_ranks
from a2tgpo.launch.run_plan import plan_of_run
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.transformer_config import check_layout
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.run.date import read_date
from a2tgpo.warmstart.examples import load_examples
from a2tgpo.warmstart.settings import as_planned, learning_rate, source_dimensions
from a2tgpo.warmstart.target import folder_of, target_of


def dry_run(config: RunConfig) -> int:
    """Check the target, the demonstrations, the layout and the plan of a warm start in one process; build no model.

    Returns:
        The exit code. It is 0 if the plan fits the GPUs, and `DOES_NOT_FIT` if not.
    """

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


def join_ranks(config: RunConfig) -> ParallelGroups:
    """Check that the machines have what a warm start needs, and join the ranks; every rank must call this."""

    settings = config.warmstart
    paths = {"warmstart.source": settings.source, "warmstart.demonstrations": settings.demonstrations}
    planned = as_planned(config, lr=learning_rate(config, source_dimensions(config)))
    needs = warm_start_needs(planned, target=target_of(config), root=folder_of(config))
    return start_ranks(planned, paths, needs)
