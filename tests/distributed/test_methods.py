"""Every preset of configs/algorithm/ trains two steps on 2 real processes with a real engine (see methods_worker.py).

All runs start from the same weights, questions and seeds, so they differ only in the method. For each preset, another
run resumes after the first step and repeats the second. One more run takes enough steps to show that a step leaves
nothing in memory.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from held_memory import held
from preloaded.command import PYTHON
from stub_judge import Reply, StubJudge, chat
from taught import taught_folder
from tiny_models import CAPITALS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from a2tgpo.protocol.tag_syntax import SEARCH_CALLS
from a2tgpo.record.rollout_files import read_step, recorded_steps
from a2tgpo.run.equality import NOT_COMPARED

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("methods_worker.py")
PRESETS = {path.stem: path for path in sorted((ROOT / "configs/algorithm").glob("*.yaml"))}
MAX_RESPONSE_TOKENS, OVERLONG_BUFFER, GROUPS_PER_STEP, GROUP_SIZE = 160, 64, 4, 8

SHORT_BUFFER = (
    f"reward.overlong_buffer_tokens={OVERLONG_BUFFER}"  # dapo's buffer is longer than these responses
)
VARIANTS = {
    "grpo_k2": ["grpo", "algorithm.kl_estimator=k2"],
    "grpo_tight": ["grpo", "algorithm.dual_clip=1.01"],
    "dapo_one_draw": ["dapo", SHORT_BUFFER, "rollout.max_draws=1"],
    # In float32 engine and trainer agree to the last digits, so about half of the weights exceed a bound of 1.
    "truncated": [
        "a2tgpo",
        "algorithm.correction.kind=truncate",
        "algorithm.correction.level=turn",
        "algorithm.correction.upper=1.0",
    ],
    "masked": ["grpo", "algorithm.correction.kind=mask", "algorithm.correction.upper=1.0"],
    "cool": ["grpo", "rollout.temperature=0.7"],
    "gain_of_reference": ["a2tgpo", "rollout.gain.scorer=reference"],
}
INITIAL = {"at2po": 3, "tree_grpo": 2}
"""For each method of trees, the number of trajectories of a group that begin at the prompt."""
TREES = {name: [name, f"rollout.tree.initial={initial}"] for name, initial in INITIAL.items()}
# gcpo samples like dapo. With dapo's draws, gcpo's first step could not be compared with those of other methods.
ONE_DRAW = "rollout.dynamic_sampling=false"
RUNS = (
    {name: [name] for name in PRESETS}
    | {"dapo": ["dapo", SHORT_BUFFER], "gcpo": ["gcpo", ONE_DRAW]}
    | VARIANTS
    | TREES
)
RESUMED = {f"{name}_resumed": RUNS[name] for name in PRESETS}
"""Each of these runs begins from the checkpoint that the preset's run saved after step 1."""
DYNAMIC = ("dapo", "dapo_one_draw")
WITH_REFERENCE = (
    "grpo",
    "gxpo",
    "hgpo",
    "tree_grpo",
    "grpo_k2",
    "grpo_tight",
    "masked",
    "cool",
)
WITH_ADAPTIVE_CLIP = ("a2tgpo", "a2tgpo_released", "turn_group_absent", "truncated", "gain_of_reference")
GOLD = {
    **{f"capital of {land}?": city for land, city in CAPITALS.items()},
    **{f"ruler of {land}?": f"King of {city}" for land, city in list(CAPITALS.items())[:3]},
    **dict.fromkeys(("babble?", "silent?", "loop?"), "nothing"),
}
HOPS = {"capital": 1, "ruler": 2, "babble?": 0, "silent?": 0, "loop?": 0}
LONG, LONG_STEPS, WARM_STEPS = "long", 16, 8
JUDGED, SCORED, ADAPTED = "judged", "scored", "adapted"
LAST_REPLY = 2
"""Number of requests that the judge answers before it closes all connections."""

pytestmark = pytest.mark.distributed


class Run:
    """The results of a run: the metrics of its steps, their rollouts, its weights, and the memory that its ranks
    held.
    """

    def __init__(self, folder: Path, trained: dict):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.steps: list[dict[str, float]] = [json.loads(line) for line in lines]
        self.folder = folder
        self.rollouts = [read_rollouts(folder, step=record["step"]) for record in self.steps]
        self.trained = trained


def read_rollouts(folder: Path, *, step: int) -> list[dict]:
    return read_step(recorded_steps(folder)[step])


@pytest.fixture(scope="module")
def runs(launched) -> dict[str, Run]:
    return {name: launched[name] for name in RUNS}


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("methods")
    config = write_inputs(root)
    overrides = {
        name: [str(PRESETS[preset]), *settings] for name, (preset, *settings) in (RUNS | RESUMED).items()
    }
    server = dying_judge()
    overrides[JUDGED] = [
        str(PRESETS["a2tgpo"]),
        "reward.names=[judge, em]",
        "reward.weights=[1, 0]",
        "reward.max_failed_share=1",
        f"judge.url={server.url}",
        "judge.model=stub",
        "judge.max_attempts=1",
    ]
    (root / "progress.py").write_text(TURN_SCORES)
    overrides[SCORED] = [
        str(PRESETS["a2tgpo"]),
        f"reward.names=[em, {root / 'progress.py'}:progress]",
        "algorithm.turn_signal=scores",
    ]
    overrides[ADAPTED] = [str(PRESETS["gxpo"]), "model.lora.rank=4"]
    overrides[LONG] = [str(PRESETS["a2tgpo"]), f"run.steps={LONG_STEPS}"]
    inputs = {"overrides": overrides, "measured": {LONG: [WARM_STEPS, LONG_STEPS]}}
    for name, content in inputs.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(WORKER), str(config), *(str(root / f"{name}.json") for name in inputs)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    server.close()
    print(result.stdout)  # the time of each run
    # dapo_one_draw does not fill its two steps.
    assert result.stderr.count("after 1 draws (rollout.max_draws=1)") == 1
    trained = json.loads((root / "runs/trained.json").read_text())
    return {name: Run(root / "runs" / name, trained[name]) for name in overrides}


def dying_judge() -> StubJudge:
    """Return a judge that answers `LAST_REPLY` requests and then closes all connections."""
    asked = itertools.count(1)

    def script(prompt: str, _: int) -> Reply:
        if next(asked) > LAST_REPLY:
            return None
        return chat("correct" if len(prompt) % 2 else "incorrect")

    return StubJudge(script)


TURN_SCORES = """
from a2tgpo.reward.episode import Score

def progress(episode):
    scores = [len(turn.observation) for turn in episode.turns if turn.calls]
    return Score(value=0.0, parts={"calls": len(scores)}, turn_scores=scores)
"""


def write_inputs(root: Path) -> Path:
    """Write the configuration of all runs. The model answers some of the questions rarely, and others never."""
    records = [{"question": q, "answers": [a], "hops": HOPS[q.split()[0]]} for q, a in GOLD.items()]
    passages = [
        {"id": land, "contents": f'"capital of {land}"\n{land} has {city}.'}
        for land, city in CAPITALS.items()
    ]
    for name, lines in (("questions", records), ("corpus", passages)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = root / "config.yaml"
    config = {
        "run": {"name": "methods", "root": str(root / "runs"), "steps": 2},
        "model": {"path": taught_folder(), "dtype": "float32"},
        "data": {
            "train": str(root / "questions.jsonl"),
            "test": str(root / "questions.jsonl"),
            "instructions": "",
            "max_prompt_tokens": 64,
        },
        "search": {"corpus": str(root / "corpus.jsonl"), "top_k": 1},
        "tools": {"max_part_tokens": 16},
        "rollout": {
            "prompts_per_step": GROUPS_PER_STEP,
            "group_size": GROUP_SIZE,
            "max_turns": 3,
            "max_turn_tokens": 48,
            "max_response_tokens": MAX_RESPONSE_TOKENS,
            "max_concurrent": 16,
            "kv_cache_gib": 0.05,
        },
        "update": {"prompts_per_minibatch": 2, "max_microbatch_tokens": 2048, "lr": 1.0e-3},
        "parallel": {"timeout_s": 60.0},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def groups_of(records: list[dict]) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = defaultdict(list)
    for record in records:
        groups[record["prompt_index"]].append(record)
    return groups


def advantages_of(run: Run) -> list[list[float]]:
    """Return the advantages of the first step's turns, by trajectory."""
    return [[turn["advantage"] for turn in record["turns"]] for record in run.rollouts[0]]


def response_tokens(record: dict) -> int:
    return sum(len(turn["tokens"]) + len(turn["observation_tokens"]) for turn in record["turns"])


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_update_all_ranks_alike(runs, name):
    run = runs[name]
    assert [record["step"] for record in run.steps] == [1, 2]
    for record in run.steps:
        assert all(value is not None and math.isfinite(value) for value in record.values())
        assert record["update/skipped"] == 0
        assert record["update/grad_norm"] > 0
        # At a low temperature all rollouts of a step may be equal.
        assert record["advantage/max"] > record["advantage/min"] or name == "cool"
        assert record["gap/train_engine_abs_mean"] < 1e-4, (
            "the engine plays with other weights or temperature"
        )
    assert equal_on_all_ranks(run)
    assert run.trained["largest_change"] > 1e-4


def equal_on_all_ranks(run: Run) -> bool:
    """Return whether all ranks ended with the same weights, to the bit."""
    return len(set(run.trained["digests"])) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_resumed_run_takes_the_same_second_step_to_the_bit(launched, name):
    whole, resumed = launched[name], launched[f"{name}_resumed"]
    assert [record["step"] for record in resumed.steps] == [2]
    assert resumed.rollouts == whole.rollouts[1:]
    expected, found = (
        {key: value for key, value in run.steps[-1].items() if not key.startswith(NOT_COMPARED)}
        for run in (whole, resumed)
    )
    assert found == expected
    assert resumed.trained["digests"] == whole.trained["digests"]


@pytest.mark.parametrize("name", RUNS)
def test_a_step_holds_whole_groups_numbered_from_0(runs, name):
    for records in runs[name].rollouts:
        groups = groups_of(records)
        assert sorted(groups) == list(range(GROUPS_PER_STEP))
        for members in groups.values():
            assert sorted(record["sample_index"] for record in members) == list(range(GROUP_SIZE))
            assert len({record["prompt_id"] for record in members}) == 1
        assert len({members[0]["prompt_id"] for members in groups.values()}) == GROUPS_PER_STEP


@pytest.mark.parametrize("name", [name for name in RUNS if name not in (*DYNAMIC, *TREES, "cool")])
def test_without_dynamic_sampling_every_method_plays_the_same_first_step(runs, name):
    """This shows that the weights were restored, and that a step without dynamic sampling has one draw."""
    played, first = runs[name], runs["a2tgpo"]
    assert not [key for key in played.steps[0] if key.startswith("sampling/")]

    def tokens(run: Run) -> list:
        return [(r["prompt_id"], [turn["tokens"] for turn in r["turns"]]) for r in run.rollouts[0]]

    assert tokens(played) == tokens(first)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_sampling_trains_on_informative_groups_and_counts_the_others(runs, name):
    for record, records in zip(runs[name].steps, runs[name].rollouts, strict=True):
        groups = groups_of(records).values()
        # Compare the rewards before the overlong penalty, because the penalty alone says nothing about answers.
        worth = [{r["exact_match"] if r["format_ok"] else -1 for r in members} for members in groups]
        num_equal = sum(len(rewards) == 1 for rewards in worth)
        assert record["sampling/unfilled_groups"] == num_equal
        num_informative = record["sampling/kept_share"] * record["sampling/groups_played"]
        num_kept = len(groups) - num_equal
        assert num_informative == pytest.approx(num_kept + record["sampling/surplus_groups"])
        assert record["sampling/groups_played"] >= GROUPS_PER_STEP
        assert -2 <= record["sampling/reward_all_mean"] <= 1
        assert 0 <= record["sampling/format_error_rate_all"] <= 1


def test_dynamic_sampling_refills_what_one_draw_leaves_empty(runs):
    once, refilled = runs["dapo_one_draw"].steps[0], runs["dapo"].steps[0]
    assert once["sampling/draws"] == 1
    assert once["sampling/groups_played"] == GROUPS_PER_STEP
    assert once["sampling/unfilled_groups"] > 0
    assert once["reward/mean"] == pytest.approx(once["sampling/reward_all_mean"])
    assert once["reward/format_error_rate"] == pytest.approx(once["sampling/format_error_rate_all"])
    assert runs["dapo_one_draw"].steps[1]["sampling/unfilled_groups"] > 0
    assert refilled["sampling/draws"] > 1
    assert refilled["sampling/groups_played"] > GROUPS_PER_STEP
    assert refilled["sampling/unfilled_groups"] < once["sampling/unfilled_groups"]
    # The engine counts everything that it played.
    assert refilled["speed/sampled_tokens"] > once["speed/sampled_tokens"]


@pytest.mark.parametrize("name", RUNS)
def test_only_dapo_lowers_the_rewards_of_long_responses(runs, name):
    lowered = []
    for record in itertools.chain.from_iterable(runs[name].rollouts):
        reward = record["exact_match"] if record["format_ok"] else -1.0
        excess = response_tokens(record) - (MAX_RESPONSE_TOKENS - OVERLONG_BUFFER)
        penalty = min(max(excess, 0), OVERLONG_BUFFER) / OVERLONG_BUFFER if name in DYNAMIC else 0.0
        assert record["outcome_reward"] == pytest.approx(reward - penalty)
        lowered.append(penalty > 0)
    assert any(lowered) == (name in DYNAMIC)


@pytest.mark.parametrize("name", RUNS)
def test_only_gxpo_extrapolates_its_updates(runs, name):
    found = [
        {key: value for key, value in record.items() if key.startswith("extrapolation/")}
        for record in runs[name].steps
    ]
    if name != "gxpo":
        assert not any(found)
        return
    # A step has two updates. The first update of the run creates the optimizer's state.
    assert [step["extrapolation/passes"] for step in found] == [2, 3]
    assert [step["extrapolation/active"] for step in found] == [0.5, 1]
    for step in found:
        assert step["extrapolation/fallbacks"] == step["extrapolation/clip_fraction"] == 0
        assert 0.5 <= step["extrapolation/multiplier"] <= 0.5 * 3.5
    plain, extrapolated = runs["grpo"], runs["gxpo"]
    assert plain.steps[0]["update/loss"] == extrapolated.steps[0]["update/loss"], (
        "equal until the second update"
    )
    assert plain.steps[1]["kl/reference"] != extrapolated.steps[1]["kl/reference"]


@pytest.mark.parametrize("name", RUNS)
def test_only_the_adaptive_clip_is_spread(runs, name):
    for record in runs[name].steps:
        scales = [record[f"clip/scale_{kind}"] for kind in ("min", "mean", "max")]
        if name in WITH_ADAPTIVE_CLIP:
            assert 0.7 < scales[0] < 1 < scales[2] < 1.3
        else:
            assert scales == [1, 1, 1]


@pytest.mark.parametrize("name", RUNS)
def test_only_grpo_is_held_to_the_reference(runs, name):
    for record in runs[name].steps:
        assert (record["kl/reference"] != 0) == (name in WITH_REFERENCE)


def test_the_kl_estimators_differ(runs):
    k2, k3 = (runs[name].steps[1]["kl/reference"] for name in ("grpo_k2", "grpo"))
    assert k2 > 0 and k3 > 0 and k2 != k3


def test_only_grpo_clips_twice(runs):
    twice = {name: max(record["clip/dual_fraction"] for record in run.steps) for name, run in runs.items()}
    assert twice["grpo_tight"] > 0  # its default bound of 3 is meant for larger steps
    assert not any(share for name, share in twice.items() if name not in WITH_REFERENCE)


def test_advantages_are_those_of_the_method(runs):
    """On the same first step, methods with the same formula agree, and all other methods differ."""
    advantages = {
        name: advantages_of(run) for name, run in runs.items() if name not in (*DYNAMIC, *TREES, "cool")
    }
    for objective in ("gspo", "cispo", "sapo", "gmpo", "gcpo", "gxpo"):
        assert advantages[objective] == advantages["grpo"]
    assert advantages["igpo_tg_rescaled"] == advantages["a2tgpo"] == advantages["truncated"]
    methods = (
        "grpo",
        "dr_grpo",
        "igpo",
        "igpo_tg",
        "a2tgpo",
        "a2tgpo_released",
        "gigpo",
        "hgpo",
        "gtpo",
        "mt_grpo",
        "turn_group_absent",
        "appo",
    )
    for one, other in itertools.combinations(methods, 2):
        assert advantages[one] != advantages[other], (one, other)
    assert all(len(set(turns)) == 1 for turns in advantages["grpo"]), "one advantage for every turn"


@pytest.mark.parametrize("name", RUNS)
def test_only_gcpo_and_appo_have_a_token_credit(runs, name):
    for record in runs[name].steps:
        credit = {key: value for key, value in record.items() if key.startswith("credit/")}
        if name == "appo":
            assert 1 <= credit["credit/influence"] <= 1.2 and credit["credit/capped_share"] < 1
            assert 2 <= credit["credit/turn_1_factor"] <= 2.2
            continue
        if name != "gcpo":
            assert not credit
            continue
        assert credit["credit/divergence"] > 0 and credit["credit/unusable_share"] == 0
        assert 2 < credit["credit/largest_weight"] < 3.2
        # Turns of few tokens have coarse ranks.
        assert 0.6 < credit["credit/top_mass"] <= 0.85
        assert credit["credit/turn_1_factor"] != pytest.approx(1)


def tokens_of(record: dict) -> list[list[int]]:
    return [turn["tokens"] for turn in record["turns"]]


@pytest.mark.parametrize("name", INITIAL)
def test_branches_share_turns_and_what_the_trainer_knows_of_them(runs, name):
    run, plain = runs[name], runs["grpo"]
    for record, records in zip(run.steps, run.rollouts, strict=True):
        num_shared = tokens_shared = 0
        for members in groups_of(records).values():
            members.sort(key=lambda r: r["sample_index"])
            assert [r["branch"] is None for r in members] == [i < INITIAL[name] for i in range(GROUP_SIZE)]
            for r in members[INITIAL[name] :]:
                for place, owner in enumerate(r["branch"]["owners"]):
                    mine, played = r["turns"][place], members[owner]["turns"][place]
                    for key in ("tokens", "rollout_logprobs", "observation_tokens", "info_gain"):
                        assert mine[key] == played[key]
                    assert name != "at2po" or mine["advantage"] == played["advantage"]
                    tokens_shared += len(mine["tokens"])
                num_shared += len(r["branch"]["owners"])
        num_branches = GROUPS_PER_STEP * (GROUP_SIZE - INITIAL[name])
        sampled = sum(len(tokens) for r in records for tokens in tokens_of(r))
        assert record["tree/branches"] == num_branches
        assert record["tree/shared_turns"] == pytest.approx(num_shared / num_branches)
        assert record["tree/shared_token_share"] == pytest.approx(tokens_shared / sampled)
        assert tokens_shared or record is not run.steps[0]
        assert record["speed/sampled_tokens"] == sampled - tokens_shared
    initial = [tokens_of(r) for r in run.rollouts[0] if r["branch"] is None]
    assert initial == [tokens_of(r) for r in plain.rollouts[0] if r["sample_index"] < INITIAL[name]]


def test_inner_branches_go_on_inside_turns_and_are_counted_but_not_trained_on(runs):
    _, tokenizer = load_taught()
    queries = 0
    for record, records in zip(runs["appo"].steps, runs["appo"].rollouts, strict=True):
        pairs = [(parent, branch) for parent in records for branch in parent["inner_branches"]]
        shared = 0
        for parent, branch in pairs:
            number, count = len(branch["branch"]["owners"]), branch["branch"]["num_tokens"]
            assert branch["branch"]["parent"] == parent["sample_index"]
            assert tokens_of(branch)[:number] == tokens_of(parent)[:number]
            turn, begun = branch["turns"][number], parent["turns"][number]
            assert 0 < count < len(begun["tokens"])
            for key in ("tokens", "rollout_logprobs"):
                assert turn[key][:count] == begun[key][:count]
            shared += sum(map(len, tokens_of(branch)[:number])) + count
            if turn["calls"]:  # the query is that of the whole turn, wherever the branch begins
                assert turn["query"] == SEARCH_CALLS.find_query(tokenizer.decode(turn["tokens"]), "search")
                queries += "<search>" in tokenizer.decode(turn["tokens"][:count])
        played = [*records, *(branch for _, branch in pairs)]
        assert record["branch/count"] == len(pairs) > 0
        assert record["branch/count"] + record["branch/unfilled"] == 8 * GROUPS_PER_STEP
        sampled = sum(len(tokens) for one in played for tokens in tokens_of(one))
        assert record["speed/sampled_tokens"] == sampled - shared
        assert record["reward/mean"] == pytest.approx(statistics.fmean(r["outcome_reward"] for r in records))
    assert queries > 0


def test_the_released_scripts_gains_are_of_log_probabilities(runs):
    def gains(name: str) -> list[tuple[float, float, float]]:
        turns = (
            (record["baseline_prob"], record["turns"][0])
            for record in runs[name].rollouts[0]
            if record["turns"][0]["query"] is not None
        )
        return [(before, turn["answer_prob"], turn["info_gain"]) for before, turn in turns]

    for before, after, gain in gains("a2tgpo_released"):
        assert gain == pytest.approx(math.log(after) - math.log(before), abs=1e-6)
    for before, after, gain in gains("a2tgpo"):
        assert gain == pytest.approx(after - before, abs=1e-9)


def test_the_reference_scores_answers_as_the_initial_policy_does_after_updates(runs):
    """In step 1 the policy still is the reference; in step 2 only the reference has the initial weights."""
    by_policy, by_reference = runs["a2tgpo"], runs["gain_of_reference"]
    assert by_policy.steps[0]["gain/scored_tokens"] > 0 == by_reference.steps[0]["gain/scored_tokens"]
    assert by_reference.steps[0]["gain/missing_rate"] == 0
    played = [record for record in by_reference.rollouts[0] if record["turns"][0]["calls"]]
    assert [answer_probs(r) for r in played] == [
        pytest.approx(answer_probs(record), rel=1e-4)
        for record in by_policy.rollouts[0]
        if record["turns"][0]["calls"]
    ]
    initial = [initial_answer_probs(record) for record in by_reference.rollouts[1][:12]]
    found = [answer_probs(record) for record in by_reference.rollouts[1][:12]]
    assert found == [pytest.approx(expected, rel=1e-4) for expected in initial]
    assert max(map(len, found)) > 1
    updated = [(answer_probs(r), initial_answer_probs(r)) for r in by_policy.rollouts[1][:12]]
    assert all(abs(now[0] / before[0] - 1) > 1e-3 for now, before in updated)


def answer_probs(record: dict) -> list[float]:
    return [record["baseline_prob"], *(turn["answer_prob"] for turn in record["turns"] if turn["calls"])]


@torch.no_grad()
def initial_answer_probs(record: dict) -> list[float]:
    """Probability of the gold answer in each context, by transformers, with the weights before training."""
    model, tokenizer = load_taught()
    question = record["prompt_text"].split("user\n")[1].split("<|im_end|>")[0]
    answer = tokenizer.encode(GOLD[question], add_special_tokens=False)
    scaffold = tokenizer.encode(" <answer> \\boxed{", add_special_tokens=False)
    context, contexts = list(record["prompt_tokens"]), [list(record["prompt_tokens"])]
    for turn in record["turns"]:
        context = [*context, *turn["tokens"], *turn["observation_tokens"]]
        contexts += [context] if turn["calls"] else []
    probabilities = []
    for tokens in contexts:
        row = torch.tensor([[*tokens, *scaffold, *answer]])
        logprobs = model(row).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        probabilities.append(logprobs[range(len(answer)), answer].mean().exp().item())
    return probabilities


@functools.cache
def load_taught() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = taught_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", RUNS)
def test_corrections_act_only_where_they_are_asked_for(runs, name):
    for record in runs[name].steps:
        if name not in ("truncated", "masked"):
            assert not [key for key in record if key.startswith("correction/")]
            continue
        kind, other = ("truncated", "masked") if name == "truncated" else ("masked", "truncated")
        share = record[f"correction/{kind}_share"]
        assert 0.05 < share < 0.95
        assert record[f"correction/{other}_share"] == 0
        # The remaining weights are all 1, apart from the last digits.
        used = 1.0 if kind == "truncated" else 1 - share
        assert record["correction/effective_sample_share"] == pytest.approx(used, abs=1e-4)


def test_steps_leave_nothing_behind_in_memory(launched):
    """Caches and TensorBoard keep a little more memory for some steps. A step's rollouts, batches or graphs would be
    far more.
    """
    run = launched[LONG]
    before = held()
    kept = read_rollouts(run.folder, step=1)
    blocks_of_rollouts = held()["python_blocks"] - before["python_blocks"]
    assert len(kept) == GROUPS_PER_STEP * GROUP_SIZE and blocks_of_rollouts > 1000
    for first, last in run.trained["held"]:
        grown = {name: (last[name] - first[name]) / (LONG_STEPS - WARM_STEPS) for name in first}
        assert grown["python_blocks"] < blocks_of_rollouts / 20, grown
        assert grown["tensors"] < 4, grown
        assert grown["bytes"] < 2**20, grown
        assert grown["files"] == 0, grown


def test_a_run_goes_on_when_its_judge_is_gone_and_leaves_out_what_was_not_judged(launched):
    run = launched[JUDGED]
    assert [record["step"] for record in run.steps] == [1, 2]
    unjudged = [[r for r in records if r["reward_error"] is not None] for records in run.rollouts]
    assert [len(records) for records in unjudged] == [record["reward/failed"] for record in run.steps]
    assert unjudged[0] and unjudged[1]
    assert all("/chat/completions" in r["reward_error"] for r in itertools.chain.from_iterable(unjudged))
    assert all(turn["advantage"] is None for records in unjudged for r in records for turn in r["turns"])
    assert all(len(records) == GROUPS_PER_STEP * GROUP_SIZE for records in run.rollouts)
    assert sum(record["judge/calls"] for record in run.steps) > LAST_REPLY
    assert run.trained["largest_change"] > 0 and equal_on_all_ranks(run)


def test_a_group_is_normalised_over_the_members_that_were_judged(launched):
    run = launched[JUDGED]
    for records, metrics in zip(run.rollouts, run.steps, strict=True):
        judged = [r for r in records if r["reward_error"] is None]
        for index in {r["prompt_index"] for r in judged}:
            members = [r for r in judged if r["prompt_index"] == index]
            rewards = [r["outcome_reward"] for r in members]
            mean = sum(rewards) / len(rewards)
            std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards) + 1e-8)
            for r in members:
                expected = (r["outcome_reward"] - mean) / (std + 1e-6) if len(members) > 1 else 0.0
                assert r["turns"][-1]["advantage"] == pytest.approx(expected, abs=1e-5) or is_process(r)
        values = [r["rewards"]["judge"] for r in judged]
        assert metrics["reward/judge_mean"] == pytest.approx(sum(values) / len(values))
        assert set(values) <= {0.0, 1.0}


def is_process(record: dict) -> bool:
    """Return whether the rollout ended with a tool call."""
    return bool(record["turns"][-1]["calls"])


def test_scores_of_turns_take_the_place_of_gains(launched):
    run = launched[SCORED]
    turns = [turn for records in run.rollouts for r in records for turn in r["turns"] if turn["calls"]]
    assert turns and all(turn["info_gain"] is None for turn in turns)
    assert all(turn["score"] == len(turn["observation_text"]) > 0 for turn in turns)
    for record in run.steps:
        assert record["turn_score/missing_rate"] == 0 and record["turn_score/turn_1_mean"] > 0
        assert not any(name.startswith("gain/turn") for name in record) and record["gain/scored_tokens"] == 0
        assert record["reward/progress.calls_mean"] == pytest.approx(record["turns/process_turns"])
    assert run.trained["largest_change"] > 0


def test_adapters_train_against_their_base_with_gxpo_and_reach_the_engine(launched):
    run = launched[ADAPTED]
    assert run.trained["largest_change"] > 0 and equal_on_all_ranks(run)
    first, second = run.steps
    assert first["kl/reference"] > 0 and second["kl/reference"] > 0
    assert second["extrapolation/active"] == 1
    assert second["memory/score_trainer_gib"] == second["memory/refit_trainer_gib"], "a second model"
    assert max(second["refit/probe_gap_max"], second["gap/train_engine_abs_max"]) < 1e-3
