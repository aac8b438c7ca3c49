"""Supervised warm start: teach a model the format from demonstrations, through the same Megatron path as RL.

    launch/local.sh -n RANKS --script launch/warmstart.py CONFIG [OVERRIDE ...]
    torchrun ... launch/warmstart.py --config CONFIG [OVERRIDE ...]
    srun ... python launch/warmstart.py --config CONFIG [OVERRIDE ...]

OVERRIDE is section.field=value or a YAML file; later ones win.
Reads `warmstart.source` and `warmstart.demonstrations`, minimises the mean cross-entropy of the tokens that the
policy should have written (prompts and observations carry no loss by default), and writes a Hugging Face checkpoint
to `model.path`, where training then finds it. Every step's demonstrations, and so the result up to rounding, are
the same for any number of ranks. Metrics go to ROOT/NAME-warmstart/.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from a2tgpo.config.check import ConfigError, require
from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.config.update import UpdateConfig
from launch.failure import exit_code
from launch.rendezvous import join_launcher

if TYPE_CHECKING:
    from torch import Tensor

    from a2tgpo.batch.packing import PackedBatch
    from a2tgpo.parallel.groups import ParallelGroups
    from a2tgpo.trajectory import Trajectory
    from a2tgpo.update.train_step import LossFunction


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="section.field=value, or a YAML file; later ones win"
    )
    args = parser.parse_intermixed_args()
    try:
        join_launcher()
        config = load_config(args.config, args.overrides)
        for field in ("source", "demonstrations"):
            value = getattr(config.warmstart, field)
            require(bool(value), f"warmstart.{field}", value, "a path, for a warm start")
        out = config.model.path
        require(not Path(out).is_file(), "model.path", out, "a folder, which a warm start writes")
        warm_start(config)
    except (ConfigError, RuntimeError, OSError) as error:
        return exit_code(error)
    return 0


def warm_start(config: RunConfig) -> None:
    """Join the other ranks, train, save; every rank calls this."""
    from a2tgpo.data.sampler import PromptSampler
    from a2tgpo.model.build import build_policy
    from a2tgpo.model.weights import save_hf
    from a2tgpo.parallel.initialize import shutdown
    from a2tgpo.run_date import run_date
    from a2tgpo.update.optimizer import build_optimizer
    from a2tgpo.update.train_step import train_step
    from launch.preflight import start_ranks

    settings = config.warmstart
    cold = dataclasses.replace(config.model, path=settings.source)
    paths = {
        "warmstart.source": settings.source,
        "warmstart.demonstrations": settings.demonstrations,
    }
    groups = start_ranks(dataclasses.replace(config, model=cold), paths)
    lock_folder(config, groups)
    trajectories = load_trajectories(config, date=run_date(config, groups))
    require(
        settings.batch_size <= len(trajectories),
        "warmstart.batch_size",
        settings.batch_size,
        f"at most the {len(trajectories)} demonstrations in {settings.demonstrations}",
    )
    sampler = PromptSampler(len(trajectories), settings.batch_size, config.run.seed)
    update = update_config(config)
    policy = build_policy(cold, config.parallel, groups, update=update)
    optimizer, schedule = build_optimizer(policy, update, total_steps=settings.steps)
    report = Report(config, groups)
    for step in range(1, settings.steps + 1):
        chosen = [trajectories[index] for index in sampler.next_indices()]
        batches = my_microbatches(chosen, config, groups)
        weights = token_weights(batches, chosen, observation_weight=settings.observation_weight)
        asked = [
            dataclasses.replace(batch, loss_mask=weight[None] > 0)
            for batch, weight in zip(batches, weights, strict=True)
        ]
        result = train_step(policy, optimizer, asked, cross_entropy(weights))
        report.add(step, chosen, loss=result.loss, grad_norm=result.grad_norm, lr=schedule.lr)
        if result.update_ok:
            schedule.step()
    save_hf(policy, config.model.path)
    report.close()
    shutdown()


def lock_folder(config: RunConfig, groups: ParallelGroups) -> None:
    """Hold the folder of the metrics until this program ends; ConfigError on every rank if another one does."""
    import torch.distributed as dist

    from a2tgpo.folder_lock import FolderLock

    fault = [""]
    if groups.rank == 0:
        folder = Path(config.run.root) / f"{config.run.name}-warmstart"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            FolderLock(folder)
        except ConfigError as error:
            fault = [str(error)]
        except OSError as error:
            fault = [f"run.root: {folder} cannot be written ({error.strerror}); choose another run.root"]
    dist.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise ConfigError(fault[0])


def load_trajectories(config: RunConfig, *, date: datetime.date) -> list[Trajectory]:
    """All demonstrations, rendered and tokenised; the same list on every rank.

    Args:
        date: what the prompts tell as today's.
    """
    from a2tgpo.data.demonstrations import load_demonstrations, to_trajectory
    from a2tgpo.data.template import PromptTemplate
    from a2tgpo.data.tokenizer import load_tokenizer
    from a2tgpo.model.hf_config import load_hf_config

    try:
        load_hf_config(config.warmstart.source)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "warmstart.source", 1)) from None
    tokenizer = load_tokenizer(config.warmstart.source, key="warmstart.source")
    template = PromptTemplate(
        tokenizer, config.data.instructions, kwargs=config.data.chat_template_kwargs, date=date
    )
    demonstrations = load_demonstrations(config.warmstart.demonstrations)
    return [
        to_trajectory(demonstration, template=template, tools=config.tools.selected, prompt_index=index)
        for index, demonstration in enumerate(demonstrations)
    ]


def update_config(config: RunConfig) -> UpdateConfig:
    """The run's optimizer settings with the warm start's rates: warm-up over a tenth, decay to a tenth."""
    settings = config.warmstart
    return dataclasses.replace(
        config.update,
        lr=settings.lr,
        min_lr=settings.lr / 10,
        lr_schedule="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=settings.weight_decay,
    )


def my_microbatches(chosen: list[Trajectory], config: RunConfig, groups: ParallelGroups) -> list[PackedBatch]:
    """This replica's share of a step, packed; every rank reaches the same split by itself."""
    from a2tgpo.batch.balance import deal, microbatches
    from a2tgpo.batch.packing import alignment, pack, packed_length

    align = alignment(config.parallel, config.model.fp8)
    lengths = [align.segment_length(packed_length(trajectory)) for trajectory in chosen]
    replicas = deal(lengths, groups.dp_size)
    mine = [index for index, replica in enumerate(replicas) if replica == groups.dp_rank]
    grouped = microbatches([lengths[index] for index in mine], config.update.max_microbatch_tokens)
    return [pack(chosen, [mine[i] for i in group], align=align) for group in grouped]


def token_weights(
    batches: list[PackedBatch], chosen: list[Trajectory], *, observation_weight: float
) -> list[Tensor]:
    """Per micro-batch [T] float32: each target's weight in the step's loss; they add up to 1 over all ranks."""
    from a2tgpo.batch.packing import PADDING, packed_length

    num_sampled = sum(trajectory.num_sampled_tokens for trajectory in chosen)
    num_predicted = sum(packed_length(trajectory) for trajectory in chosen)
    total = max(1.0, num_sampled + observation_weight * (num_predicted - num_sampled))
    weights = []
    for batch in batches:
        sampled, real = batch.loss_mask[0].float(), (batch.sequence_ids[0] != PADDING).float()
        weights.append((sampled + observation_weight * (real - sampled)) / total)
    return weights


def cross_entropy(weights: list[Tensor]) -> LossFunction:
    """Weighted sum of -log p over the tokens of each micro-batch."""

    def loss(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -(weights[number].to(logprobs.device) * logprobs).sum(), {}

    return loss


class Report:
    """Progress line, metrics and closing line of rank 0; silent on the others."""

    def __init__(self, config: RunConfig, groups: ParallelGroups) -> None:
        from tqdm import tqdm

        from a2tgpo.metrics.writer import MetricWriter

        self.out, self.steps = config.model.path, config.warmstart.steps
        self.enabled = groups.rank == 0
        # The writer's own progress line is about rollouts: it goes nowhere here.
        self.writer = MetricWriter(
            Path(config.run.root) / f"{config.run.name}-warmstart",
            total_steps=self.steps,
            enabled=self.enabled,
            stream=io.StringIO(),
        )
        self.bar: Any = tqdm(
            total=self.steps,
            disable=not self.enabled,
            desc="warm start",
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
        )
        self.losses: list[float] = []
        self.num_tokens = 0
        self.start = self.last = time.perf_counter()

    def add(self, step: int, chosen: list[Trajectory], *, loss: float, grad_norm: float, lr: float) -> None:
        now = time.perf_counter()
        num_tokens = sum(trajectory.num_tokens for trajectory in chosen)
        self.losses.append(loss)
        self.num_tokens += num_tokens
        speed, self.last = num_tokens / (now - self.last), now
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": speed}
        self.writer.log(step, {f"warmstart/{name}": value for name, value in metrics.items()})
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Say what came out; every rank calls this."""
        self.bar.close()
        self.writer.close()
        if self.enabled:
            seconds = self.last - self.start
            print(
                f"warm start: {self.steps} steps in {seconds:.0f} s ({self.num_tokens / seconds:,.0f} tokens/s), "
                f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, saved to {self.out}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
