"""Check a training run and print its plan, without building a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.config.load import dump_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_mix import load_question_mix
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet, contrast_prompt_set
from a2tgpo.data.tokenizer import load_tokenizer
from a2tgpo.environment.tool import build_tools
from a2tgpo.evaluate.sets import load_evaluation_sets
from a2tgpo.io.exit_codes import DOES_NOT_FIT
from a2tgpo.launch.needs import training_inputs
from a2tgpo.launch.run_plan import plan_of_run
from a2tgpo.launch.search_rate import search_shortfall
from a2tgpo.loss.credit import needs_contrast
from a2tgpo.model.experts import check_router_settings
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.rope import check_positions
from a2tgpo.model.transformer_config import check_layout
from a2tgpo.parallel.initialize import shutdown
from a2tgpo.plan.advice import faults
from a2tgpo.plan.report import plan_text
from a2tgpo.protocol.build import build_protocol
from a2tgpo.reward.load import build_rewards, need_answers
from a2tgpo.reward.pool import RewardPool
from a2tgpo.run.date import read_date
from a2tgpo.run.resume import check_resume, find_record, require_same_run, trained_so_far
from a2tgpo.run.rules import TRAINING
from a2tgpo.run.starts import require_same


def dry_run(config: RunConfig, *, resume: str, accept_changes: bool) -> int:
    """Check the files, the layout and the ranks of a run, and print the resolved configuration and the plan.

    Returns:
        The exit code. It is 0 if the plan fits the GPUs, and `DOES_NOT_FIT` if not.
    """
    check_resume(resume)
    config.check_training()
    rewards = build_rewards(config)
    with_answers = need_answers(config, rewards)
    RewardPool(rewards, config.reward).close()
    folder = Path(config.run.root) / config.run.name
    if resume != "none" and (done := trained_so_far(folder)):
        require_same(folder, config, TRAINING, accept=accept_changes, done=done)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from a2tgpo.launch.preflight import start_ranks

        start_ranks(config, training_inputs(config, resume=resume))
        shutdown()
    hf_config = load_hf_config(config.model.path)
    check_layout(hf_config, config.parallel, config.model.fp8)
    check_router_settings(config.update, hf_config)
    check_positions(config.model.path, hf_config, config.max_model_len)
    if config.rollout.router_replay:
        ExpertShape.of(hf_config)
    mix = load_question_mix(config.data.train_files, need_answers=with_answers)
    test_sets = load_evaluation_sets(config, is_whole=True, need_answers=with_answers)
    toolset = build_tools(config)
    toolset.close()
    template = build_protocol(
        config, load_tokenizer(config.model.path), schemas=toolset.schemas, date=read_date(folder)
    ).template
    limit = config.data.max_prompt_tokens
    train_prompts, *others = (
        PromptSet(questions, template, max_prompt_tokens=limit)
        for questions in (mix.questions, *test_sets.values())
    )
    if needs_contrast(config.algorithm):
        others.append(contrast_prompt_set(mix.questions, template, config))
    for of_set in (train_prompts, *others):
        of_set.check_lengths()
    per_step = config.rollout.prompts_per_step
    sampler = PromptSampler(
        mix.sizes, per_step, config.run.seed, weights=mix.weights, fingerprint=train_prompts.fingerprint
    )
    if (found := find_record(config, resume)) is not None:
        require_same_run(*found, hf_config, sampler)
    config.rollout.check_questions(len(train_prompts))
    # If no launcher started this process, plan for the configured cluster, so that a login node can check a run.
    gpus = int(os.environ.get("WORLD_SIZE", config.cluster.gpus))
    plan, source, card = plan_of_run(config, num_gpus=gpus)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        print(dump_config(config), end="")
        for line in f"planned for {gpus} x {card}\n\n{plan_text(plan, source=source)}\n".splitlines():
            print(f"# {line}".rstrip())  # as a comment, so that the output is a valid configuration
        print(
            f"# dry run: files and layout are fine; {len(train_prompts)} training and "
            f"{sum(map(len, test_sets.values()))} test questions"
        )
        if shortfall := search_shortfall(config, num_gpus=gpus)[0]:
            print(f"# warning: {shortfall}")
    if not plan.fits and is_first:
        first, *further = faults(plan)
        more = f" (and {len(further)} more, above)" if further else ""
        print(f"error: does not fit {gpus} x {plan.gpu.name}: {first}{more}", file=sys.stderr, flush=True)
    return 0 if plan.fits else DOES_NOT_FIT
