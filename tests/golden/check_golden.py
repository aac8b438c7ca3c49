"""Run golden vectors through the trainer's own functions.

    python tests/golden/check_golden.py DIR [--tolerance 1e-9] [-v]

DIR contains *.json files with `schema` a2tgpo-golden/{advantage,loss,ig,em}/1. The program computes in float64, and
prints the largest absolute error of each file or, with -v, of each case. The exit code is 1 if an error exceeds the
tolerance, and 2 if a file cannot be checked.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import build_turn_table
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.loss.aggregate import token_weights
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.kl import kl_penalty
from a2tgpo.loss.policy_loss import policy_loss
from a2tgpo.protocol.tag_format import TagFormat
from a2tgpo.reward.answer_match import f1_score
from a2tgpo.reward.episode import EpisodeReader
from a2tgpo.reward.info_gain import answer_probability, info_gains, mean_logprob
from a2tgpo.reward.load import NamedReward
from a2tgpo.reward.methods.em import ExactMatch
from a2tgpo.reward.total import judge
from a2tgpo.trajectory import Call, LogProbs, Prompt, TokenIds, Trajectory, Turn

ADVANTAGE_OF_MODE = {
    "turn-group-v1d": "turn_group",
    "joint": "igpo_joint",
    "separate": "igpo_separate",
    "grpo": "grpo",
}
KL_OF_NAME = {"k1": "k1", "k2": "k2", "low_var_kl": "k3"}

Check = tuple[str, float]
"""Case name and its largest absolute error."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-9)
    parser.add_argument("-v", "--verbose", action="store_true", help="one line a case")
    args = parser.parse_args()
    files = sorted(args.directory.glob("*.json"))
    if not files:
        print(f"error: {args.directory} has no *.json; give a folder of golden files", file=sys.stderr)
        return 2
    failed = unreadable = 0
    for path in files:
        try:
            checks = list(check_file(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"error: {path} is not a golden file this tool knows: {error!r}", file=sys.stderr)
            unreadable += 1
            continue
        bad = [check for check in checks if not check[1] <= args.tolerance]
        failed += len(bad)
        for name, gap in checks if args.verbose else bad:
            print(f"  {name}: {gap:.3g}")
        worst = max((gap for _, gap in checks), default=math.nan)
        print(
            f"{path.name}: {len(checks)} checks, max abs error {worst:.3g}, {len(bad)} past {args.tolerance:g}"
        )
    return 2 if unreadable else int(failed > 0)


def check_file(golden: dict) -> Iterator[Check]:
    """Yield the checks of one golden file, by its schema."""
    kind = golden["schema"].split("/")[1]
    checkers = {"advantage": check_advantages, "loss": check_losses, "ig": check_gains, "em": check_rewards}
    if kind not in checkers:
        raise ValueError(f"schema {golden['schema']!r}")
    return checkers[kind](golden)


def check_advantages(golden: dict) -> Iterator[Check]:
    for case in golden["cases"]:
        if "not-comparable" in case.get("flags", []):
            continue
        trajectories = [to_trajectory(item) for item in indexed_by_prompt(case["trajectories"])]
        advantages, scales, gains, outcomes = turn_values(trajectories, case["config"])
        errors = []
        for row, (trajectory, expect) in enumerate(zip(trajectories, case["expect"], strict=True)):
            num_turns = len(trajectory.turns)
            errors.append(max_error(advantages[row, :num_turns], expect["adv"]))
            if "norm_ig" in expect:
                errors.append(max_error(gains[row, : num_turns - 1], expect["norm_ig"][:-1]))
            if "norm_outcome" in expect:
                errors.append(max_error(outcomes[row : row + 1], [expect["norm_outcome"]]))
            if "clip_scale" in expect:
                errors.append(max_error(scales[row, :num_turns], expect["clip_scale"]))
        yield case["name"], max(errors)


def check_losses(golden: dict) -> Iterator[Check]:
    for batch in golden["batches"]:
        if batch.get("advantage_config"):
            yield f"{batch['name']}/advantages", batch_advantage_error(batch)
        for run in batch["runs"]:
            if "not-comparable" not in run.get("flags", []):
                name = "{level}/{agg}".format(**run["config"])
                yield f"{batch['name']}/{name}", loss_error(batch, run)
    if "kl" in golden:
        logprobs, reference = float64(golden["kl"]["logprob"]), float64(golden["kl"]["ref_logprob"])
        for name, estimator in KL_OF_NAME.items():
            penalty = kl_penalty(logprobs, reference, estimator)
            yield f"kl/{name}", max_error(penalty, golden["kl"]["expect"][name])


def check_gains(golden: dict) -> Iterator[Check]:
    for case in golden["cases"]:
        logprobs = [mean_logprob(tokens) for tokens in case["answer_token_logprobs"]]
        expect = case["expect"]
        yield (
            f"case {case['id']}",
            max(
                max_error(float64(info_gains(logprobs, measure="log_probability")), expect["ig_logprob"]),
                max_error(float64([answer_probability(p) for p in logprobs]), expect["prob"]),
                max_error(float64(info_gains(logprobs, measure="probability")), expect["ig_prob"]),
            ),
        )


def scores(response: str, golds: tuple[str, ...]) -> tuple[str | None, bool, float, float, float]:
    """Return answer, format, reward, EM and F1 of a whole response."""
    trajectory = Trajectory(
        prompt_index=0,
        prompt_id="",
        sample_index=0,
        prompt_tokens=TokenIds(),
        turns=[Turn(tokens=TokenIds(), rollout_logprobs=LogProbs())],
        stop_reason="",
    )
    prompt = Prompt(index=0, id="", question="", answers=golds, tokens=())
    episode = EpisodeReader(format=TagFormat(opening_tags=""), decode=str).read(
        trajectory, prompt, [response]
    )
    em = NamedReward(label="em", weight=1.0, reward=ExactMatch(), path=Path())
    verdict = judge([em], episode, format_gate=True)
    f1 = 0.0 if episode.answer is None else f1_score(episode.answer, golds)
    return episode.answer, episode.format_ok, verdict.total, verdict.rewards["em"], f1


def check_rewards(golden: dict) -> Iterator[Check]:
    for case in golden["cases"]:
        if any(flag.startswith("quirk") for flag in case.get("flags") or []):
            continue
        answer, format_ok, reward, match, f1 = scores(case["response"], tuple(case["golds"]))
        train, ungated = case["expect_train"], case["expect_eval"]
        wrong = [
            format_ok != train["format_ok"],
            format_ok and answer != train["answer"],
            answer is not None and answer != ungated["answer"],
            (answer is None) != (ungated["score"] == -1.0),
        ]
        yield (
            case["name"],
            max(
                abs(reward - train["score"]),
                abs(match - ungated["em"]),
                abs(f1 - ungated["f1"]),
                float(any(wrong)),
            ),
        )


def turn_values(trajectories: list[Trajectory], config: dict) -> tuple[torch.Tensor, ...]:
    """Return advantages and clip scales [N, T + 1], normalised gains [N, T] and outcomes [N]."""
    table = build_turn_table(
        trajectories,
        num_prompts=1 + max(t.prompt_index for t in trajectories),
        max_turns=max(1, *(t.num_process_turns for t in trajectories)),
    )
    algorithm = AlgorithmConfig(
        advantage=ADVANTAGE_OF_MODE[config["mode"]],
        gamma=config.get("gamma") or 1.0,
        alpha=1.0 if config.get("alpha") is None else config["alpha"],
        clip_beta=config.get("beta") or 0.0,
        normalize_by_std=config["norm_by_std"],
    )
    result = compute_advantages(table, algorithm, dp_group=None)
    scales = clip_scale(torch.nn.functional.pad(result.normalized_gain, (0, 1)), beta=algorithm.clip_beta)
    return result.advantages, scales, result.normalized_gain, result.normalized_outcome


def batch_advantage_error(batch: dict) -> float:
    trajectories = [to_trajectory(item) for item in indexed_by_prompt(batch["trajectories"])]
    advantages, scales, _, _ = turn_values(trajectories, batch["advantage_config"])
    errors = []
    for row, item in enumerate(batch["trajectories"]):
        errors.append(max_error(advantages[row, : len(item["gen"])], item["adv"]))
        if item.get("clip_scale"):
            errors.append(max_error(scales[row, : len(item["gen"])], item["clip_scale"]))
    return max(errors)


def loss_error(batch: dict, run: dict) -> float:
    """Return the largest error of one run's loss, ratios, token losses, gradients and clip fractions."""
    config, expect = run["config"], run["expect"]
    tokens = flatten_sampled_tokens(batch["trajectories"])
    weights = token_weights(
        torch.tensor([sum(item["gen"]) for item in batch["trajectories"]]),
        aggregation=config["agg"],
        norm_length=batch["padded_len"],
        dp_group=None,
    )
    algorithm = AlgorithmConfig(
        ratio=config["level"],
        clip_low=config["eps_low"],
        clip_high=config["eps_high"],
        dual_clip=config.get("dual_clip_c", 0.0),
        aggregation=config["agg"],
    )
    logprobs = float64(tokens["new"]).requires_grad_()
    sequence_ids = torch.tensor(tokens["sequence"])
    scale = float64(tokens["scale"]) if config.get("dynamic") else torch.ones(len(tokens["new"])).double()
    result = policy_loss(
        logprobs,
        LossInputs(
            old_logprobs=float64(tokens["old"]),
            advantages=float64(tokens["adv"]),
            clip_scale=scale,
            weights=weights[sequence_ids],
            turn_ids=torch.tensor(tokens["turn"]),
            sequence_ids=sequence_ids,
            num_turns=max(tokens["turn"]) + 1,
            num_sequences=len(batch["trajectories"]),
        ),
        algorithm,
    )
    result.loss.backward()
    assert logprobs.grad is not None
    errors = [
        abs(result.loss.item() - expect["loss"]),
        abs(result.is_clipped.double().mean().item() - expect["clip_fraction"]),
        abs(result.is_dual_clipped.double().mean().item() - expect["clip_fraction_lower"]),
        abs((float64(tokens["old"]) - logprobs.detach()).mean().item() - expect["approx_kl"]),
    ]
    per_token = {"token_loss": result.token_loss, "token_grad": logprobs.grad}
    if config["level"] == "token":
        errors += [
            max_error(values, [x for row in expect[key] for x in row]) for key, values in per_token.items()
        ]
    else:
        turn = {"turn_ratio": result.ratio, **{f"turn_{key}": values for key, values in per_token.items()}}
        for key, values in turn.items():
            by_turn = [x for row in expect[key] for x in row]
            errors.append(max_error(values, [by_turn[i] for i in tokens["turn"]]))
    return max(errors)


def flatten_sampled_tokens(trajectories: list[dict]) -> dict[str, list]:
    """Return old and new log-prob, advantage, clip scale, turn id and sequence id of each sampled token."""
    flat: dict[str, list] = {key: [] for key in ("old", "new", "adv", "scale", "turn", "sequence")}
    turn_id = 0
    for sequence_id, item in enumerate(trajectories):
        scales = item.get("clip_scale") or [1.0] * len(item["gen"])
        start = 0
        for num_gen, num_obs, advantage, scale in zip(
            item["gen"], item["obs"], item["adv"], scales, strict=True
        ):
            flat["old"] += item["old"][start : start + num_gen]
            flat["new"] += item["new"][start : start + num_gen]
            flat["adv"] += [advantage] * num_gen
            flat["scale"] += [scale] * num_gen
            flat["turn"] += [turn_id] * num_gen
            flat["sequence"] += [sequence_id] * num_gen
            start += num_gen + num_obs
            turn_id += 1
    return flat


def indexed_by_prompt(items: list[dict]) -> list[dict]:
    names = list(dict.fromkeys(item["prompt"] for item in items))
    return [{**item, "prompt_index": names.index(item["prompt"])} for item in items]


def to_trajectory(item: dict) -> Trajectory:
    """Build a trajectory with the golden turns. Token ids are placeholders, because only their number matters."""
    turns = [
        Turn(
            tokens=TokenIds([0] * num_gen),
            rollout_logprobs=LogProbs([0.0] * num_gen),
            observation_tokens=TokenIds([0] * num_obs),
            calls=[] if gain is None else [Call(tool="search", arguments="")],
            info_gain=gain,
        )
        for num_gen, num_obs, gain in zip(item["gen"], item["obs"], item["ig"], strict=True)
    ]
    return Trajectory(
        prompt_index=item["prompt_index"],
        prompt_id=item["prompt"],
        sample_index=0,
        prompt_tokens=TokenIds(),
        turns=turns,
        stop_reason="answer",
        outcome_reward=item["outcome"],
    )


def float64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def max_error(values: torch.Tensor, expect: list) -> float:
    """Return the largest |difference|; inf if lengths differ or a value is missing."""
    if values.numel() != len(expect):
        return math.inf
    if not expect:
        return 0.0
    if any(x is None for x in expect):
        return math.inf
    error = (values.detach().double() - float64(expect)).abs().max().item()
    return error if math.isfinite(error) else math.inf


if __name__ == "__main__":
    sys.exit(main())
