"""Checks of the refit, which each of the 2 ranks of test_refit.py runs.

torchrun --nproc-per-node 2 refit_worker.py RESULTS.json replicas MODEL     one engine per rank beside Megatron
torchrun --nproc-per-node 2 refit_worker.py RESULTS.json shared MODEL ROOT  one engine over both, then one per rank
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
import zlib
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from adapters import fill_adapters
from carried_checks import (
    SETTINGS,
    Run,
    check_an_engine_per_rank_plays_what_the_one_carried,
    check_engines_take_prompts_on_demand,
    check_one_engine_over_both_ranks_carries_groups_on,
    trainer_parts,
)
from claims import Claims
from played import run as play
from played import tags
from rendered_sets import rendered_sets
from safetensors.torch import load_file
from scripted_search import ScriptedSearch, toolset_of
from storage_tally import StorageTally
from tiny_models import prompt_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2tgpo.batch.packing import alignment, pack
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.evaluate.evaluate import evaluate
from a2tgpo.model import weight_gather
from a2tgpo.model.build import build_policy
from a2tgpo.model.experts import is_expert
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION, TokenDistribution
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.engine_group import EngineGroup
from a2tgpo.parallel.initialize import initialize, lay_out, shutdown
from a2tgpo.refit.handover import refit
from a2tgpo.refit.verify import probe_tokens, probe_trajectory, verify_refit
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.rollout.weight_names import checkpoint_shapes
from a2tgpo.trajectory import Prompt
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.train_step import train_step

WORLD_TIMEOUT_S = 60


def make_engine(path, **settings):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.05, max_concurrent=8, dtype="float32", **settings)
    return config, VllmEngine(path, config=config, model_dtype="float32", max_model_len=256, seed=0)


def make_policy(path, parallel, groups, **options):
    model = ModelConfig(path=path, dtype="float32", **options)
    return build_policy(model, parallel, groups, update=UpdateConfig())


def change_weights(policy, cycle):
    """Multiply every parameter by a factor that depends on the parameter and on `cycle`, but not on the shard."""
    with torch.no_grad():
        for model in policy.gpt_models:
            for name, parameter in model.named_parameters():
                parameter.mul_(1.0 + 0.2 * math.sin(cycle + zlib.crc32(name.encode()) % 97))


class Events:
    """Records the events of a refit in order: a collective is issued, a rank waits for it, a tensor is handed to the
    engine.
    """

    def __init__(self, engine):
        self.log, self.buckets, self.tensors, self.tally = [], [], {}, StorageTally()
        self._engine = engine

    def __enter__(self):
        patch = self._patches = ExitStack()
        for issue in (dist.broadcast, dist.all_gather_into_tensor):
            patch.enter_context(mock.patch.object(dist, issue.__name__, self._logged(issue)))
        grouped, load = weight_gather.buckets, self._engine.load_weights

        def logged_buckets(*args, **settings):
            self.buckets = grouped(*args, **settings)
            return self.buckets

        patch.enter_context(mock.patch.object(weight_gather, "buckets", logged_buckets))
        self._engine.load_weights = lambda weights, version: load(self._watched(weights), version=version)
        patch.callback(delattr, self._engine, "load_weights")
        return self

    def __exit__(self, *_):
        self._patches.close()

    def of(self, kind):
        return [rest for event, *rest in self.log if event == kind]

    def _logged(self, issue):
        def call(tensor, *args, **settings):
            number = len(self.of("issued"))
            self.log.append(("issued", issue.__name__, tuple(tensor.shape)))
            work = issue(tensor, *args, **settings)
            return SimpleNamespace(wait=lambda: (self.log.append(("waited", number)), work.wait()))

        return call

    def _watched(self, weights):
        weights = iter(weights)
        while True:
            with self.tally:  # the export runs inside this block, and the engine outside it
                named = next(weights, None)
            if named is None:
                return
            self.log.append(("handed", named[0]))
            self.tensors[named[0]] = named[1].clone()
            yield named
            del named


def check_what_a_refit_moves(policy, engine, path, version):
    """Check that a refit hands over every bit of the checkpoint's weights, and no other bytes. Check its order and
    its memory.
    """
    bucket_bytes = 2**16
    with Events(engine) as events:
        report = refit(policy, engine, version=version, bucket_mib=bucket_bytes / 2**20)
    expected = load_file(Path(path, "model.safetensors"))
    assert events.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in events.tensors.items())
    tied = policy.tied_embeddings
    minimum = 4 * sum(math.prod(shape) for shape in checkpoint_shapes(path, tied=tied).values())
    assert report.num_bytes == minimum and report.num_tensors == len(events.of("handed"))
    check_order_of_collectives(policy, events)
    # A full parameter, as fused by Megatron, is the smallest unit that can be gathered and split.
    sizes = [record.num_bytes(policy.groups, torch.float32) for bucket in events.buckets for record in bucket]
    (second, parameter), tally = sorted(sizes)[-2:], events.tally
    assert 0 < tally.largest_bytes <= max(bucket_bytes, parameter), (tally.largest_bytes, parameter)
    # The memory consists of the bucket being loaded, the bucket in flight, and one parameter twice: in full, and as
    # exported tensors. One of the buckets may contain the largest parameter. This sum is far below a copy of the
    # model.
    bound = max(bucket_bytes, parameter) + max(bucket_bytes, second) + 2 * parameter
    assert tally.peak_bytes <= bound < 0.7 * minimum, (tally.peak_bytes, bound, minimum)
    assert refit(policy, engine, version=version, bucket_mib=1).skipped


def check_order_of_collectives(policy, events):
    """Whenever the engine gets a tensor, all collectives of the next bucket are issued, and none of the bucket after
    it.
    """
    groups, mapped = policy.groups, policy.bridge._weight_name_mapping_mcore_to_hf
    assert len(events.buckets) > 5
    collectives, tensors = [], []  # of each bucket
    for bucket in events.buckets:
        parts = [record.num_parts(groups) for record in bucket]
        collectives.append(sum((groups.pp_size > 1) + (count > 1) for count in parts))
        tensors.append(
            sum(
                len(mapped(record.name)) * (count if is_expert(record.name) else 1)
                for record, count in zip(bucket, parts, strict=True)
            )
        )
    assert sum(collectives) > 5, "nothing travels here"
    reading, issued, left = 0, 0, tensors[0]
    for kind, *_ in events.log:
        issued += kind == "issued"
        if kind == "handed":
            while left == 0:
                reading += 1
                left = tensors[reading]
            left -= 1
            assert issued == sum(collectives[: reading + 2]), (reading, issued, collectives)
    assert (reading, left) == (len(tensors) - 1, 0)
    assert len(set(map(tuple, events.of("waited")))) == issued == sum(collectives)
    mine, theirs = all_gather_object(events.of("issued"), dist.group.WORLD)
    assert mine == theirs, "the ranks issued collectives in different orders"


def check_one_engines_refusal_stops_both(policy, engine, rank, version):
    """Rank 1's engine refuses a tensor, lacks a tensor at the end, or fails without a message. No rank waits
    forever.
    """

    def mute(weights, shapes, *, tied):
        yield from itertools.islice(weights, 5)
        raise AssertionError

    query = "model.layers.0.self_attn.q_proj.weight"
    for change, expected in (
        (
            mock.patch.dict(engine._shapes, {query: (63,)}),
            r"refit: weight .*q_proj.weight is .* \[63\] \(rank 1\)",
        ),
        (
            mock.patch.dict(engine._shapes, {"model.extra": (1,)}),
            r"refit: the export lacks model.extra \(rank 1\)",
        ),
        (
            mock.patch("a2tgpo.rollout.vllm_engine.checked_weights", mute),
            r"AssertionError \(rank 1\)",
        ),
    ):
        message = "nothing was raised"
        with Events(engine) as events, change if rank == 1 else nullcontext():
            try:
                refit(policy, engine, version=version, bucket_mib=2**-4)
            except RuntimeError as error:
                message = str(error)
        assert re.fullmatch(expected, message), message
        assert engine.needs_weights == (rank == 1)
        assert len(set(map(tuple, events.of("waited")))) == len(events.of("issued")) > 5
        version += 1
    assert not refit(policy, engine, version=version, bucket_mib=1).skipped


def trainer_logprobs(policy, parallel, trajectories, distribution=MODEL_DISTRIBUTION):
    """Return the trainer's log p of every sampled token, by trajectory. Observations are left out."""
    batch = pack(trajectories, range(len(trajectories)), align=alignment(parallel, Fp8Config()))
    (scores,) = compute_logprobs(policy, [batch], distribution=distribution)
    return scores.logprobs[batch.loss_mask[0]]


def rank_trajectories(engine, rank, cycle):
    """Return sampled continuations of a prompt that only this rank has. Rank 1 plays one continuation more."""
    prompt = [5 + rank, 9, 20 + cycle]
    for sample in range(2 + rank):
        engine.submit(
            str(sample), prompt, max_tokens=12, seed=10 * cycle + sample, temperature=1.0, top_p=1.0, stop=[]
        )
    trajectories = []
    while engine.has_unfinished:
        for output in engine.step():
            trajectory = probe_trajectory([*prompt, *output.tokens])
            trajectory.prompt_tokens = prompt
            trajectory.turns[0].tokens = output.tokens
            trajectory.turns[0].rollout_logprobs = output.logprobs
            trajectories.append(trajectory)
    return trajectories


def check_three_cycles(policy, parallel, engine, rank, first_version):
    world = dist.group.WORLD
    probe = probe_tokens(engine.num_token_ids, 64)
    gaps = []
    for cycle in range(first_version, first_version + 3):
        change_weights(policy, cycle)
        report = refit(policy, engine, version=cycle, bucket_mib=1)
        assert not report.skipped and report.num_tensors > 15 and report.num_bytes > 0
        expected = trainer_logprobs(policy, parallel, [probe_trajectory(probe)])
        gap = verify_refit(engine, probe, expected, version=cycle, tolerance=1e-3, group=world)
        gaps.append(gap.max)
        if parallel.tensor == 1:  # each rank trains on its own
            played = rank_trajectories(engine, rank, cycle)
            found = [value for t in played for value in t.turns[0].rollout_logprobs]
            sampled = TokenDistribution(num_ids=engine.num_token_ids)
            theirs = trainer_logprobs(policy, parallel, played, sampled)
            assert len(played) == 2 + rank
            torch.testing.assert_close(torch.tensor(found), theirs, atol=2e-4, rtol=0)
    assert max(gaps) < 2e-4, gaps
    assert refit(policy, engine, version=first_version + 2, bucket_mib=1).skipped
    return gaps


def check_training_step(policy, parallel, engine, rank, version):
    """After rollout, update and refit, the played tokens are more probable, equally for the trainer and for the
    engine.
    """
    optimizer, _ = build_optimizer(policy, UpdateConfig(lr=1e-3), total_steps=1)
    played = rank_trajectories(engine, rank, version)
    batch = pack(played, range(len(played)), align=alignment(parallel, Fp8Config()))
    before = trainer_logprobs(policy, parallel, played).mean()

    def loss(number, logprobs, entropy):
        return -logprobs[batch.loss_mask[0]].sum(), {}

    assert train_step(policy, optimizer, [batch], loss).update_ok
    assert trainer_logprobs(policy, parallel, played).mean() > before
    assert not refit(policy, engine, version=version, bucket_mib=1).skipped
    probe = played[0].prompt_tokens + played[0].turns[0].tokens
    expected = trainer_logprobs(policy, parallel, [probe_trajectory(probe)])
    verify_refit(engine, probe, expected, version=version, tolerance=2e-4, group=dist.group.WORLD)


def check_one_bad_rank_stops_both(policy, parallel, engine, rank):
    def damaged():
        for name, tensor in iterate_hf_weights(policy):
            yield name, tensor * 1.1 if rank == 1 and name == "model.norm.weight" else tensor

    engine.load_weights(damaged(), version=99)
    probe = probe_tokens(engine.num_token_ids, 64)
    expected = trainer_logprobs(policy, parallel, [probe_trajectory(probe)])
    try:
        verify_refit(engine, probe, expected, version=99, tolerance=1e-3, group=dist.group.WORLD)
    except RuntimeError as error:
        assert "refit after step 99" in str(error)
    else:
        raise AssertionError("rank 1 holds wrong weights and nobody noticed")


def check_adapters(path, parallel, groups, engine, version):
    """After a refit the engine's log-probs are those of the policy with its adapters, not those of the base."""
    policy = make_policy(path, parallel, groups, lora=LoraConfig(rank=4))
    fill_adapters(policy, spread=1.0)
    assert not refit(policy, engine, version=version, bucket_mib=1).skipped
    probe = probe_tokens(engine.num_token_ids, 64)
    expected = trainer_logprobs(policy, parallel, [probe_trajectory(probe)])
    verify_refit(engine, probe, expected, version=version, tolerance=2e-4, group=dist.group.WORLD)
    base = trainer_logprobs(policy.base, parallel, [probe_trajectory(probe)])
    assert (base - expected).abs().mean() > 0.1


def check_world(groups):
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * 3, "the engine broke the world"
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.tp_group)
    assert total.item() == groups.tp_size
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def run_replicas(claims, path):
    data_parallel, tensor_parallel, pipeline_parallel = (
        ParallelConfig(expert=2, timeout_s=WORLD_TIMEOUT_S),
        ParallelConfig(tensor=2, sequence=True, expert=2, timeout_s=WORLD_TIMEOUT_S),
        ParallelConfig(pipeline=2, timeout_s=WORLD_TIMEOUT_S),
    )
    groups = initialize(data_parallel, seed=3)
    state = torch.get_rng_state()
    _, engine = make_engine(path)
    assert torch.equal(state, torch.get_rng_state()), "the engine reseeded the trainer"
    policy = make_policy(path, data_parallel, groups)
    assert refit(policy, engine, version=0, bucket_mib=1).skipped, "the engine loaded version 0 itself"
    claims.check("what_a_refit_moves[dp2]", check_what_a_refit_moves, policy, engine, path, 20)
    claims.check("three_cycles[dp2]", check_three_cycles, policy, data_parallel, engine, groups.rank, 1)
    claims.check("training_step[dp2]", check_training_step, policy, data_parallel, engine, groups.rank, 4)
    claims.check("world[dp2]", check_world, groups)
    groups = lay_out(tensor_parallel, seed=3)
    policy = make_policy(path, tensor_parallel, groups)
    refusal, bad_rank = check_one_engines_refusal_stops_both, check_one_bad_rank_stops_both
    claims.check("what_a_refit_moves[tp2]", check_what_a_refit_moves, policy, engine, path, 21)
    claims.check("one_engines_refusal_stops_both[tp2]", refusal, policy, engine, groups.rank, 30)
    claims.check("three_cycles[tp2]", check_three_cycles, policy, tensor_parallel, engine, groups.rank, 5)
    claims.check("one_bad_rank_stops_both[tp2]", bad_rank, policy, tensor_parallel, engine, groups.rank)
    claims.check("adapters[tp2]", check_adapters, path, tensor_parallel, groups, engine, 50)
    claims.check("world[tp2]", check_world, groups)
    groups = lay_out(pipeline_parallel, seed=3)
    policy = make_policy(path, pipeline_parallel, groups)
    claims.check("what_a_refit_moves[pp2]", check_what_a_refit_moves, policy, engine, path, 22)
    claims.check("one_engines_refusal_stops_both[pp2]", refusal, policy, engine, groups.rank, 40)
    engine.close()
    claims.check("world[pp2]", check_world, groups)


def run_shared(claims, path, root):
    from vllm.distributed.parallel_state import destroy_model_parallel

    groups = initialize(ParallelConfig(tensor=2, timeout_s=WORLD_TIMEOUT_S), seed=3)
    config, engine = make_engine(path, tensor_parallel=2, **SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(path)
    claims.check(
        "both_ranks_play_alike", check_both_ranks_play_alike, path, config, engine, tokenizer, groups
    )
    policy = make_policy(path, ParallelConfig(tensor=2), groups)
    trainer = trainer_parts(policy)
    run = Run(root, path, config, groups, trainer=trainer, engine=engine, tokenizer=tokenizer)
    played = claims.check("groups_are_carried_on", check_one_engine_over_both_ranks_carries_groups_on, run)
    trained = [member for trained, _ in played or [] for member in trained]
    claims.check("carried_logprobs", check_logprobs_against_transformers, path, trained)
    run.close()
    version = engine.weight_version + 1
    claims.check(
        "three_cycles", check_three_cycles, policy, ParallelConfig(tensor=2), engine, groups.rank, version
    )
    engine.close()
    destroy_model_parallel()  # vLLM holds one layout per process
    config, engine = make_engine(path, **SETTINGS)
    run = Run(root, path, config, groups, trainer=trainer, engine=engine, tokenizer=tokenizer)
    claims.check(
        "an_engine_per_rank_plays_what_the_one_carried",
        check_an_engine_per_rank_plays_what_the_one_carried,
        run,
        played,
    )
    claims.check("engines_take_prompts_on_demand", check_engines_take_prompts_on_demand, run)
    run.close()
    engine.close()
    claims.check("world", check_world, groups)


def check_both_ranks_play_alike(path, config, engine, tokenizer, groups):
    """Each rank has half of one engine. Rank 0 searches, and both ranks play the same trajectories."""
    search = ScriptedSearch(delays={"capital of France": 0.3}, failing=["capital of Peru"])
    engine_group = EngineGroup(rank=groups.rank, group=groups.tp_group)
    rollout = GroupRollout(
        engine,
        toolset_of(search),
        tags(tokenizer, gain=config.gain),
        rollout=config,
        engine_group=engine_group,
    )
    questions = {"capital of France?": "Paris", "capital of Peru?": "Lima", "ruler of Italy?": "King of Rome"}
    prompts = [
        Prompt(index=i, id=q, question=q, answers=(a,), hops=1, tokens=tuple(prompt_ids(tokenizer, q)))
        for i, (q, a) in enumerate(questions.items())
    ]
    trajectories, counts = play(rollout, prompts, seed=1, version=2)
    mine, theirs = all_gather_object([t.to_dict() for t in trajectories], groups.tp_group)
    assert mine == theirs, "the ranks of one engine played different rollouts"
    assert counts.tool_calls >= 6 and counts.failed_calls >= 1
    assert bool(search.queries) == (groups.rank == 0), "only the first rank searches"
    check_logprobs_against_transformers(path, trajectories)
    metrics = evaluate(rollout, rendered_sets(test=prompts), engine_group)
    assert metrics["num_questions"] == 3
    assert all_gather_object(metrics, groups.tp_group) == [metrics, metrics]
    rollout.close()


def check_logprobs_against_transformers(path, trajectories):
    num_token_ids = len(AutoTokenizer.from_pretrained(path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for trajectory in trajectories:
        tokens = list(trajectory.prompt_tokens)
        for turn in trajectory.turns:
            start, tokens = len(tokens), [*tokens, *turn.tokens]
            with torch.no_grad():
                # The engine never samples ids that the tokenizer lacks, so its distribution excludes them.
                logits = model(torch.tensor([tokens])).logits[0, :, :num_token_ids].log_softmax(-1)
            expected = logits[start - 1 : -1].gather(1, torch.tensor(list(turn.tokens))[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(list(turn.rollout_logprobs)), expected, atol=2e-4, rtol=0)
            tokens += turn.observation_tokens


if __name__ == "__main__":
    out, mode, *places = sys.argv[1:]
    found = Claims()
    {"replicas": run_replicas, "shared": run_shared}[mode](found, *places)
    found.save(out)
    shutdown()
