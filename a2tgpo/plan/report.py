"""Format a plan as text tables and as one JSON object. Every number has its unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from a2tgpo.plan.activations import EXPERT_CROWDING
from a2tgpo.plan.adapters import all_adapters
from a2tgpo.plan.advice import cache_shortage, faults
from a2tgpo.plan.engine import cache_gib_of_share
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.layouts import overrides
from a2tgpo.plan.parameters import checkpoint_parameters, stage_parameters
from a2tgpo.plan.plan import Plan
from a2tgpo.plan.rollout_time import refit_bytes
from a2tgpo.plan.train_time import PassTime, update_volume
from a2tgpo.plan.transfers import transfer_bytes

SUGGESTIONS_SHOWN = 12
HOUR_S, DAY_S = 3600, 86400


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table whose first column is left-aligned and whose other columns are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plan_text(plan: Plan, *, source: str) -> str:
    """Return all tables of a plan as one text. `source` says where the dimensions come from."""
    parts = [
        _heading(plan, source),
        _memory_table(plan),
        _verdict(plan),
        _geometry_table(plan),
        _time_table(plan),
        _run_line(plan),
        _volume_table(plan),
        _assumption_lines(plan),
    ]
    return "\n\n".join(parts)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the numbers of `plan_text` as JSON values. Each number's name contains its unit."""
    return {
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "parameters": checkpoint_parameters(plan.dimensions),
        "parameters_by_stage": _parameters_by_stage(plan),
        "adapter_parameters": all_adapters(plan.config, plan.dimensions),
        "memory_bytes": {
            phase.name: {
                "stage": phase.stage,
                "parts": {name: round(size) for name, size in phase.parts.items()},
                "peak": round(phase.peak),
                "capacity": round(phase.capacity),
                "headroom_share": round(phase.headroom, 4),
            }
            for phase in plan.phases
        },
        "host_memory_bytes": {
            **{name: round(size) for name, size in dataclasses.asdict(plan.host).items()},
            "total": round(plan.host.total),
            "capacity": round(plan.gpu.host_memory_gib * GIB),
        },
        "storage": {
            "checkpoint": plan.checkpoint_bytes,
            "kept": round(plan.kept_bytes),
            "restart_read": plan.restart_bytes,
        },
        "faults": faults(plan),
        "geometry": {**dataclasses.asdict(plan.geometry), "displaced": round(plan.geometry.displaced, 1)},
        "operations": {"token_forward": plan.token_flops, **plan.stage_flops},
        "seconds": {name: round(value, 2) for name, value in plan.stage_seconds.items()},
        "step_seconds": round(plan.step_seconds, 2),
        "run_seconds": round(plan.run_seconds),
        "update_mfu_share": round(plan.update_mfu, 4),
        "searches": dataclasses.asdict(plan.searches),
        "workload": dataclasses.asdict(plan.workload),
        "assumptions": dataclasses.asdict(plan.assumed),
        "overrides": overrides(plan),
    }


def suggestion_text(plans: Sequence[Plan]) -> str:
    """Return a table of the layouts in `plans`, in the same order, and the overrides that set the first layout."""
    if not plans:
        return "no layout fits with the required headroom; use more GPUs or a card with more memory"
    rows = []
    for plan in plans[:SUGGESTIONS_SHOWN]:
        config, seconds = plan.config, plan.stage_seconds
        fullest = min(plan.phases, key=lambda phase: phase.headroom)
        rows.append(
            [
                f"{config.parallel.tensor} x {config.parallel.pipeline} x {plan.geometry.data_parallel}",
                f"{config.parallel.virtual}",
                f"{config.parallel.expert}",
                "yes" if config.parallel.sequence else "no",
                config.model.recompute,
                str(config.rollout.tensor_parallel),
                f"{config.rollout.gpu_memory_fraction:.2f}",
                f"{config.update.max_microbatch_tokens:,}",
                f"{fullest.headroom:.0%} {fullest.name}",
                f"{seconds['rollout']:.0f} s",
                f"{seconds['score']:.0f} s",
                f"{seconds['update']:.0f} s",
                f"{plan.step_seconds:.0f} s",
            ]
        )
    header = [
        "tensor x pipeline x data", "virtual", "expert", "sequence", "recompute", "engine TP", "engine share",
        "micro-batch tokens", "left over", "rollout", "score", "update", "step",
    ]  # fmt: skip
    pasted = " ".join(overrides(plans[0]))
    return f"{table(header, rows)}\n\nthe first one: {pasted}"


def _heading(plan: Plan, source: str) -> str:
    parallel, config = plan.config.parallel, plan.config
    lines = [
        f"model      {checkpoint_parameters(plan.dimensions):,} parameters ({source})",
        f"cluster    {plan.gpus} x {plan.gpu.name}, {plan.gpu.memory_gib:.1f} GiB each",
        f"trainer    tensor {parallel.tensor} x {f'context {parallel.context} x ' if parallel.context > 1 else ''}"
        f"pipeline {parallel.pipeline} x data {plan.geometry.data_parallel}, "
        f"{f'{parallel.virtual} chunks a stage, ' if parallel.virtual > 1 else ''}"
        f"{f'expert {parallel.expert}, ' if plan.dimensions.experts else ''}"
        f"sequence parallel {'on' if parallel.sequence else 'off'}, recompute {config.model.recompute}, "
        f"{config.model.dtype}{_fp8_text(plan)}",
        f"engine     {plan.geometry.engines} of tensor {config.rollout.tensor_parallel}"
        f"{_quantization_text(plan)}, {share_text(plan)}",
        f"a rank     {', '.join(_parameters_by_stage_text(plan))}",
        *_adapter_lines(plan),
    ]
    return "\n".join(lines)


def _adapter_lines(plan: Plan) -> list[str]:
    lora = plan.config.model.lora
    if not lora.enabled:
        return []
    trained, all_parameters = (
        all_adapters(plan.config, plan.dimensions),
        checkpoint_parameters(plan.dimensions),
    )
    targets = ", ".join(lora.targets_of(has_experts=bool(plan.dimensions.experts)))
    return [
        f"adapters   {trained:,} trained parameters of rank {lora.rank} in {targets}; the other "
        f"{all_parameters:,} are frozen"
    ]


def _fp8_text(plan: Plan) -> str:
    fp8 = plan.config.model.fp8
    if not fp8.enabled:
        return ""
    kept = ""
    if fp8.first_layers_bf16 + fp8.last_layers_bf16:
        kept = f" but in {fp8.first_layers_bf16} layers at the start and {fp8.last_layers_bf16} at the end"
    return f", FP8 {fp8.format} {fp8.recipe}{kept}"


def _quantization_text(plan: Plan) -> str:
    quantization = plan.config.rollout.quantization
    return "" if quantization == "none" else f", weights quantised ({quantization})"


def share_text(plan: Plan) -> str:
    """Return a text that says which share of each GPU an engine takes, and how large its cache is."""
    rollout = plan.config.rollout
    share = f"{rollout.gpu_memory_fraction:.1%} of a card"
    cache = f" with {rollout.kv_cache_gib:g} GiB of KV cache" if rollout.kv_cache_gib else ""
    return f"{share}{cache}{', chosen by this plan' if plan.share_is_chosen else ''}"


def _parameters_by_stage(plan: Plan) -> list[int]:
    parallel = plan.config.parallel
    return [stage_parameters(plan.dimensions, parallel, stage).total for stage in range(parallel.pipeline)]


def _parameters_by_stage_text(plan: Plan) -> list[str]:
    counts = _parameters_by_stage(plan)
    if len(counts) <= 2 or len(set(counts[1:-1])) > 1:
        return [f"stage {stage}: {count:,} parameters" for stage, count in enumerate(counts)]
    return [
        f"stage 0: {counts[0]:,} parameters",
        f"stages 1 to {len(counts) - 2}: {counts[1]:,}",
        f"stage {len(counts) - 1}: {counts[-1]:,}",
    ]


def _memory_table(plan: Plan) -> str:
    names = list(dict.fromkeys(name for phase in plan.phases for name in phase.parts))
    names = [name for name in names if name != "reserve"] + ["reserve"]
    rows = [
        [name, *(_size(phase.parts[name]) if name in phase.parts else "-" for phase in plan.phases)]
        for name in names
    ]
    rows.append(["sum", *(_size(phase.peak) for phase in plan.phases)])
    rows.append(["left over", *(f"{phase.headroom:.1%}" for phase in plan.phases)])
    header = [
        "memory of the fullest rank",
        *(f"{phase.name} (stage {phase.stage})" for phase in plan.phases),
    ]
    return f"{table(header, rows)}\n\n{_host_table(plan)}\n\n{_storage_table(plan)}"


def _host_table(plan: Plan) -> str:
    host, capacity = plan.host, plan.gpu.host_memory_gib * GIB
    rows = [
        ["what leaves the cards", _size(host.offloaded)],
        ["a checkpoint being written", _size(host.saving)],
        *(
            [["what precedes an extrapolated update", _size(host.before_update)]]
            if host.before_update
            else []
        ),
        *([["experts of the step's tokens", _size(host.experts)]] if host.experts else []),
        ["processes", _size(host.processes)],
        ["sum", f"{_size(host.lasting)} of {_size(capacity)}"],
        ["while loading, processes included", _size(host.loading + host.processes)],
    ]
    return table(
        [f"host memory of the fullest node, {min(plan.gpu.gpus_per_node, plan.gpus)} ranks", ""], rows
    )


def _storage_table(plan: Plan) -> str:
    rows = [
        ["a checkpoint", _disk_size(plan.checkpoint_bytes)],
        ["all checkpoints at the most, with one being written", _disk_size(plan.kept_bytes)],
        ["read at a restart, by all nodes", _disk_size(plan.restart_bytes)],
    ]
    return table(["shared file system", ""], rows)


def _verdict(plan: Plan) -> str:
    lines = [f"DOES NOT FIT: {fault}" for fault in faults(plan)] or ["fits in every phase"]
    if shortage := cache_shortage(plan):
        lines.append(f"SLOWER: {shortage}")
    return "\n".join(lines)


def _geometry_table(plan: Plan) -> str:
    g, config = plan.geometry, plan.config
    rows = [
        ["trajectories per step", f"{g.trajectories:,}"],
        ["trajectories per engine", f"{g.trajectories_per_engine:,.1f}"],
        ["tokens per step", f"{g.tokens:,.0f} tokens, {g.sampled_tokens:,.0f} of them sampled"],
        ["operations per token, forward", f"{plan.token_flops / 1e9:,.1f} GFLOP"],
        [
            "operations of a step's scoring and update",
            f"{plan.stage_flops['score'] / 1e15:,.1f} and {plan.stage_flops['update'] / 1e15:,.1f} PFLOP",
        ],
        ["optimizer steps", f"{g.optimizer_steps}"],
        [
            "micro-batches per optimizer step and replica",
            f"{g.microbatches} of {g.microbatch_tokens:,.0f} tokens on average",
        ],
        ["KV cache of an engine", f"{g.kv_tokens:,} tokens{_cache_hint(plan)}"],
        [f"sequences of {config.max_model_len:,} tokens in it", f"{g.full_sequences}"],
        ["trajectories decoded at once", f"{g.concurrent}"],
        ["tool calls", _calls_text(plan)],
    ]
    return table(["batch", ""], rows)


def _calls_text(plan: Plan) -> str:
    demand = plan.searches
    return f"{demand.queries:,.0f} a step: {demand.per_second:,.1f}/s, at most {demand.at_once:,} at a time"


def _cache_hint(plan: Plan) -> str:
    """Return a hint on how to set the cache's size, or an empty text if the configuration sets it."""
    config = plan.config
    fixed = 0.0 if config.rollout.kv_cache_gib else cache_gib_of_share(config, plan.dimensions, plan.gpu)
    return f" (fixed by rollout.kv_cache_gib={fixed:g})" if fixed else ""


def _time_table(plan: Plan) -> str:
    details = {
        "rollout": _nonzero(dataclasses.asdict(plan.rollout)),
        "score": _pass_details(plan.score)
        if plan.score_passes
        else "by the update, which has one mini-batch",
        "update": f"{_pass_details(plan.update)}; MFU {plan.update_mfu:.0%}",
        "refit": f"{refit_bytes(plan) / 1e9:.1f} GB to every rank",
        "transfers": f"{transfer_bytes(plan) / 1e9:.1f} GB between each GPU and its host",
        "other": "exchange, advantages, packing, records",
    }
    step = plan.step_seconds
    rows = [
        [name, f"{seconds:.1f} s", f"{seconds / step:.0%}", details[name]]
        for name, seconds in plan.stage_seconds.items()
    ]
    rows.append(
        ["step", f"{step:.1f} s", "100%", f"{plan.geometry.tokens / step / plan.gpus:,.0f} tokens/s/GPU"]
    )
    width = max(len(row[0]) for row in rows)
    return "predicted time of a step\n" + "\n".join(
        f"{name.ljust(width)}  {seconds:>8}  {share:>4}  {detail}" for name, seconds, share, detail in rows
    )


def _run_line(plan: Plan) -> str:
    """Return a line that says how long the run takes, and how many steps fit into a day and into a week."""
    steps, seconds = plan.config.run.steps, plan.run_seconds
    time = f"{seconds / HOUR_S:.1f} hours" if seconds < 2 * DAY_S else f"{seconds / DAY_S:.1f} days"
    a_day, a_week = DAY_S / plan.step_seconds, 7 * DAY_S / plan.step_seconds
    return (
        f"run.steps={steps} take {time}; a day is enough for {a_day:,.0f} steps, a week for {a_week:,.0f}; without "
        "evaluations, checkpoints and starts"
    )


def _pass_details(passes: PassTime) -> str:
    return _nonzero(dataclasses.asdict(passes))


def _nonzero(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05)


def _volume_table(plan: Plan) -> str:
    volume = update_volume(plan)
    rows = [
        ["update, tensor parallel", f"{volume.tensor / 1e9:.1f} GB"],
        *([["update, context parallel", f"{volume.context / 1e9:.1f} GB"]] if volume.context else []),
        ["update, pipeline", f"{volume.pipeline / 1e9:.1f} GB"],
        ["update, data parallel", f"{volume.data / 1e9:.1f} GB"],
        *([["update, expert parallel", f"{volume.expert / 1e9:.1f} GB"]] if plan.dimensions.experts else []),
        ["refit, received", f"{refit_bytes(plan) / 1e9:.1f} GB"],
    ]
    return table(["sent by a rank in one step", ""], rows)


def _assumption_lines(plan: Plan) -> str:
    w, a, gpu = plan.workload, plan.assumed, plan.gpu
    lines = [
        "assumed",
        f"  a trajectory: {w.prompt_tokens:.0f} prompt and {w.response_tokens:.0f} response tokens, "
        f"{w.sampled_share:.0%} of these sampled, {w.turns:g} tool calls of {w.tool_seconds:g} s; the longest "
        f"samples {w.longest_to_mean:g} times the mean",
        f"  compute: {a.compute_utilisation:.0%} of {gpu.peak_flops(plan.config.model.dtype) / 1e12:.0f} TFLOP/s in "
        f"training, {a.prefill_utilisation:.0%} in the engine's prefill; {a.imbalance:.0%} lost to uneven replicas",
        f"  output layer: at the {w.output_share:.0%} of a trajectory's tokens that are sampled; room for logits "
        "at every token of a micro-batch",
        *_fp8_lines(plan),
        *_expert_lines(plan),
        f"  memory: {a.memory_utilisation:.0%} of {gpu.memory_tb_per_s:g} TB/s",
        f"  links: {a.link_utilisation:.0%} of {gpu.node_gb_per_s:g} GB/s within a node and "
        f"{gpu.network_gb_per_s:g} GB/s between nodes, never overlapped; "
        f"{gpu.host_gb_per_s:g} GB/s between a GPU and its host",
        f"  engine: {1e3 * a.decode_step_s:g} ms of host time a step and {1e6 * a.decode_sequence_s:g} us a "
        f"trajectory, {1e6 * a.collective_latency_s:g} us an all-reduce; {a.tail_concurrency:.1%} of the "
        "trajectories in the tail",
        f"  gain: {a.answer_tokens:g} tokens scored after every turn",
        f"  other stages: {a.fixed_s:g} s",
        f"  reserve: {a.context_gib:g} GiB for CUDA, NCCL and cuBLAS, and {a.fragmentation:.0%} of the rest for "
        "fragmentation",
    ]
    return "\n".join(lines)


def _fp8_lines(plan: Plan) -> list[str]:
    if not plan.config.model.fp8.enabled and plan.config.rollout.quantization == "none":
        return []
    return [
        f"  FP8: linear layers {plan.assumed.fp8_speed:g} times as fast as in bfloat16, quantisation included; "
        "attention, output layer and all that is sent as in bfloat16"
    ]


def _expert_lines(plan: Plan) -> list[str]:
    if plan.config.parallel.expert == 1:
        return []
    return [
        "  experts: the rank that the router sends most to gets "
        f"{EXPERT_CROWDING - 1:.0%} more tokens than the mean, and the others wait for it"
    ]


def _disk_size(size: float) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / 2**20:.1f} MiB"
