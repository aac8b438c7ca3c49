"""What each of the 2 ranks of test_refit.py runs.

torchrun --nproc-per-node 2 refit_worker.py replicas MODEL     one engine per rank beside Megatron
torchrun --nproc-per-node 2 refit_worker.py shared MODEL       one engine over both ranks
"""

from __future__ import annotations

import functools
import math
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripted_search import ScriptedSearch, toolset_of
from storage_tally import StorageTally
from tiny_models import prompt_ids

from a2tgpo.batch.packing import alignment, pack
from a2tgpo.config.fp8 import Fp8Config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import RolloutConfig
from a2tgpo.config.update import UpdateConfig
from a2tgpo.evaluate.evaluate import evaluate
from a2tgpo.evaluate.score import score_trajectory
from a2tgpo.model.build import build_policy
from a2tgpo.model.weights import iterate_hf_weights
from a2tgpo.parallel.collectives import all_gather_object
from a2tgpo.parallel.initialize import initialize, lay_out, shutdown
from a2tgpo.refit.handover import refit
from a2tgpo.refit.verify import probe_tokens, probe_trajectory, verify_refit
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.rollout.weight_names import checkpoint_shapes
from a2tgpo.trajectory import Prompt
from a2tgpo.update.optimizer import build_optimizer
from a2tgpo.update.score import score
from a2tgpo.update.train_step import train_step

WORLD_TIMEOUT_S = 60


def make_engine(path, **settings):
    from a2tgpo.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(kv_cache_gib=0.05, max_concurrent=8, dtype="float32", **settings)
    return config, VllmEngine(path, config=config, model_dtype="float32", max_model_len=256, seed=0)


def make_policy(path, parallel, groups):
    model = ModelConfig(path=path, dtype="float32")
    return build_policy(model, parallel, groups, update=UpdateConfig())


def change_weights(policy, cycle):
    """A different factor for every parameter and cycle, the same on all shards of it."""
    with torch.no_grad():
        for model in policy.gpt_models:
            for name, parameter in model.named_parameters():
                parameter.mul_(1.0 + 0.2 * math.sin(cycle + zlib.crc32(name.encode()) % 97))


def check_what_a_refit_moves(policy, engine, path, version):
    """Bytes handed over against those of the weights, and the memory that the export takes while it does so."""
    tally, handed, load = StorageTally(), [], engine.load_weights

    def watched(weights):
        weights = iter(weights)
        while True:
            with tally:  # the export runs in here, the engine outside
                named = next(weights, None)
            if named is None:
                return
            handed.append(named[1].numel() * named[1].element_size())
            yield named

    engine.load_weights = lambda weights, version: load(watched(weights), version=version)
    bucket_bytes = 2**16
    report = refit(policy, engine, version=version, bucket_mib=bucket_bytes / 2**20)
    tied = policy.tied_embeddings
    minimum = 4 * sum(math.prod(shape) for shape in checkpoint_shapes(path, tied=tied).values())
    assert minimum <= sum(handed) <= 1.05 * minimum, (sum(handed), minimum)
    assert report.num_bytes == sum(handed) and report.num_buckets > 5
    # A parameter in full, as Megatron fuses it, is the least that can be gathered and taken apart.
    parameter = 4 * max(policy.groups.tp_size * p.numel() for m in policy.gpt_models for p in m.parameters())
    assert 0 < tally.largest_bytes <= max(bucket_bytes, parameter), (tally.largest_bytes, parameter)
    # Its shards, the parts gathered and the whole, beside the bucket before: far from a copy of the model.
    assert tally.peak_bytes <= bucket_bytes + 3 * parameter < 0.7 * minimum, (tally.peak_bytes, minimum)
    assert refit(policy, engine, version=version, bucket_mib=1).skipped
    assert sum(handed) == report.num_bytes, "weights that the engine holds were moved again"
    del engine.load_weights


def trainer_logprobs(policy, parallel, trajectories):
    """log p of every sampled token by the trainer, trajectory by trajectory (no observations)."""
    batch = pack(trajectories, range(len(trajectories)), align=alignment(parallel, Fp8Config()))
    (scores,) = score(policy, [batch])
    return scores.logprobs[batch.loss_mask[0]]


def rank_trajectories(engine, rank, cycle):
    """Sampled continuations of a prompt that only this rank has; rank 1 plays one more."""
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
        gap = verify_refit(engine, probe, expected, step=cycle, tolerance=1e-3, group=world)
        gaps.append(gap.max)
        if parallel.tensor == 1:  # each rank trains on its own
            played = rank_trajectories(engine, rank, cycle)
            found = [value for t in played for value in t.turns[0].rollout_logprobs]
            theirs = trainer_logprobs(policy, parallel, played)
            assert len(played) == 2 + rank
            torch.testing.assert_close(torch.tensor(found), theirs, atol=2e-4, rtol=0)
    assert max(gaps) < 2e-4, gaps
    assert refit(policy, engine, version=first_version + 2, bucket_mib=1).skipped
    return gaps


def check_training_step(policy, parallel, engine, rank, version):
    """Rollout, update, refit: what was played becomes likelier by the trainer, and by the engine alike."""
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
    verify_refit(engine, probe, expected, step=version, tolerance=2e-4, group=dist.group.WORLD)


def check_one_bad_rank_stops_both(policy, parallel, engine, rank):
    def damaged():
        for name, tensor in iterate_hf_weights(policy):
            yield name, tensor * 1.1 if rank == 1 and name == "model.norm.weight" else tensor

    engine.load_weights(damaged(), version=99)
    probe = probe_tokens(engine.num_token_ids, 64)
    expected = trainer_logprobs(policy, parallel, [probe_trajectory(probe)])
    try:
        verify_refit(engine, probe, expected, step=99, tolerance=1e-3, group=dist.group.WORLD)
    except RuntimeError as error:
        assert "refit at step 99" in str(error)
    else:
        raise AssertionError("rank 1 holds wrong weights and nobody noticed")


def check_world(groups):
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * 3, "the engine broke the world"
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.tp_group)
    assert total.item() == groups.tp_size
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def run_replicas(path):
    data_parallel, tensor_parallel = (
        ParallelConfig(expert=2, timeout_s=WORLD_TIMEOUT_S),
        ParallelConfig(tensor=2, sequence=True, expert=2, timeout_s=WORLD_TIMEOUT_S),
    )
    groups = initialize(data_parallel, seed=3)
    state = torch.get_rng_state()
    _, engine = make_engine(path)
    assert torch.equal(state, torch.get_rng_state()), "the engine reseeded the trainer"
    policy = make_policy(path, data_parallel, groups)
    assert refit(policy, engine, version=0, bucket_mib=1).skipped, "the engine loaded version 0 itself"
    check_three_cycles(policy, data_parallel, engine, groups.rank, 1)
    check_training_step(policy, data_parallel, engine, groups.rank, 4)
    check_what_a_refit_moves(policy, engine, path, 20)
    check_world(groups)
    groups = lay_out(tensor_parallel, seed=3)
    policy = make_policy(path, tensor_parallel, groups)
    check_three_cycles(policy, tensor_parallel, engine, groups.rank, 5)
    check_what_a_refit_moves(policy, engine, path, 21)
    check_one_bad_rank_stops_both(policy, tensor_parallel, engine, groups.rank)
    engine.close()
    check_world(groups)
    shutdown()


def run_shared(path):
    """Both ranks hold half of one engine: rank 0 searches, both play the same."""
    groups = initialize(ParallelConfig(tensor=2, timeout_s=WORLD_TIMEOUT_S), seed=3)
    config, engine = make_engine(path, tensor_parallel=2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    search = ScriptedSearch(delays={"capital of France": 0.3}, failing=["capital of Peru"])
    rollout = GroupRollout(
        engine,
        toolset_of(search),
        tokenizer,
        rollout=config,
        score_trajectory=functools.partial(score_trajectory, measure="probability"),
        replica_group=groups.tp_group,
    )
    questions = {"capital of France?": "Paris", "capital of Peru?": "Lima", "ruler of Italy?": "King of Rome"}
    prompts = [
        Prompt(index=i, id=q, question=q, answers=(a,), hops=1, tokens=tuple(prompt_ids(tokenizer, q)))
        for i, (q, a) in enumerate(questions.items())
    ]
    trajectories, counts = rollout.run(prompts, seed=1, step=2, group_size=2)
    mine, theirs = all_gather_object([t.to_dict() for t in trajectories], groups.tp_group)
    assert mine == theirs, "the ranks of one engine played different rollouts"
    assert counts.tool_calls >= 6 and counts.failed_calls >= 1
    assert bool(search.queries) == (groups.rank == 0), "only the first rank searches"
    check_logprobs_against_transformers(path, trajectories)
    metrics, _ = evaluate(
        rollout, prompts, replica_index=0, num_replicas=1, is_replica_first=groups.rank == 0
    )
    assert metrics["num_questions"] == 3
    assert all_gather_object(metrics, groups.tp_group) == [metrics, metrics]
    policy = make_policy(path, ParallelConfig(tensor=2), groups)
    check_three_cycles(policy, ParallelConfig(tensor=2), engine, groups.rank, 1)
    rollout.close()
    engine.close()
    check_world(groups)
    shutdown()


def check_logprobs_against_transformers(path, trajectories):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for trajectory in trajectories:
        tokens = list(trajectory.prompt_tokens)
        for turn in trajectory.turns:
            start, tokens = len(tokens), tokens + turn.tokens
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            expected = logits[start - 1 : -1].gather(1, torch.tensor(turn.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(turn.rollout_logprobs), expected, atol=2e-4, rtol=0)
            tokens = tokens + turn.observation_tokens


if __name__ == "__main__":
    {"replicas": run_replicas, "shared": run_shared}[sys.argv[1]](sys.argv[2])
    print("ALL CHECKS PASSED", flush=True)
