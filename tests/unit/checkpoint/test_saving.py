"""Saving during the training: retention, full disks, damaged files, and the copy that protects from changes."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved_run import Run, new_parts, scores, world
from tiny_models import build_model

from a2tgpo.checkpoint import checked_files
from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint import writer as checkpoint_writer
from a2tgpo.collect.carried_pool import Carried, Entry
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.config.rollout import PartialConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.build import build_policy
from a2tgpo.record.rollout_files import part_path, recorded_steps
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.trajectory import Call, Prompt, Trajectory, Turn

__all__ = ["world"]


def test_every_mth_checkpoint_stays_besides_the_newest(world, tmp_path):
    run = Run(world, tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        run.save(step)
    assert run.steps == [4, 8, 9, 10]
    assert [checkpoint.has_weights_only(run.checkpoints / f"step_{step}") for step in run.steps] == [
        *(True, True),
        *(False, False),
    ]


def test_the_weight_of_the_entropy_is_restored_to_the_bit(world, tmp_path):
    first = Run(world, tmp_path)
    for entropy in (0.1, 0.1, 0.3, 0.15):
        first.parts.entropy_weight.follow(entropy)
    first.save(4)
    second = Run(world, tmp_path)
    assert second.step == 4 and second.parts.entropy_weight.value == first.parts.entropy_weight.value > 0


def test_the_gate_of_the_extrapolation_is_restored_to_the_bit(world, tmp_path):
    first = Run(world, tmp_path)
    for norm in (9.0, 0.1, 0.2, 0.3):
        first.parts.extrapolation.gate.observe(norm)
    first.save(4)
    second = Run(world, tmp_path)
    assert second.parts.extrapolation.gate.observe(0.4) == first.parts.extrapolation.gate.observe(0.4) > 0


def test_of_the_best_the_weights_alone_stay_and_are_what_was_saved(world, tmp_path):
    """The weights can be evaluated, but a run cannot continue from them. The newest checkpoint stays whole, even if
    it is the best, until newer ones exist.
    """
    weight = next(world.parts.policy.gpt_models[0].parameters())
    run = Run(world, tmp_path, keep=2)
    run.save(1, 0.5)
    assert not checkpoint.has_weights_only(run.checkpoints / "step_1")
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    for step in (2, 3):
        run.save(step)
    best = run.checkpoints / "step_1"
    assert run.steps == [1, 2, 3] and run.best_step == 1 and checkpoint.has_weights_only(best)
    assert sorted(path.name for path in best.iterdir()) == ["complete.json", "sharded", "state.json"]
    checkpoint.load_weights(best, run.parts.policy)
    assert torch.equal(weight, before)
    with pytest.raises(ConfigError, match="has only weights, and a run cannot continue from them"):
        Run(world, tmp_path, resume=str(best))
    for step in (2, 3):
        shutil.rmtree(run.checkpoints / f"step_{step}")
    assert checkpoint.latest(run.checkpoints) is None


def test_weights_that_are_kept_for_good_stay_within_their_gigabytes(world, tmp_path):
    run = Run(world, tmp_path, keep=1, keep_every=1)
    run.save(1, 0.5)
    run.save(2)
    size = size_of(run.checkpoints / "step_1")
    run = Run(world, tmp_path, keep=1, keep_every=1, keep_gb=2.5 * size / 1e9)
    for step in range(3, 7):
        run.save(step)
    assert run.steps == [1, 5, 6], "the best, the newest weights, the newest"


def test_of_dropped_checkpoints_two_folders_with_a_whole_one_each_are_kept(world, tmp_path, caplog):
    run = Run(world, tmp_path, keep=9)
    for _ in range(3):
        for step in (1, 2, 3):
            run.save(step)
        run = Run(world, tmp_path, keep=9, resume=str(run.checkpoints / "step_1"))
    dropped = sorted(run.checkpoints.glob("dropped_*"))
    assert [path.name for path in dropped] == ["dropped_2", "dropped_3"]
    assert "dropped_1: there are 2 newer ones" in caplog.text
    for folder in dropped:
        assert checkpoint.has_weights_only(folder / "step_2")
        assert not checkpoint.has_weights_only(folder / "step_3")


def test_a_run_set_aside_is_told_with_its_size_and_the_oldest_goes_if_so_configured(world, tmp_path, caplog):
    for number in range(1, 4):
        run = Run(world, tmp_path, resume="none")
        run.save(1)
        (run.folder.path / "large").write_bytes(bytes(50_000_000 * number))
    Run(world, tmp_path, resume="none", keep_previous=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "r.previous_2", "r.previous_3"]
    lines = [record.message for record in caplog.records if "previous" in record.message]
    assert re.fullmatch(
        r"set .*/r aside as r.previous_1 \(0.05\d* GB; all r.previous_N together: .*\)", lines[0]
    )
    assert re.fullmatch(r"removed .*/r.previous_1 \(0.05\d* GB\): checkpoint.keep_previous is 2", lines[2])
    assert re.fullmatch(r".*r.previous_3 \(0.15\d* GB; all r.previous_N together: 0.25\d* GB\)", lines[3])


def test_a_complete_checkpoint_removes_the_oldest_recorded_rollouts_that_it_covers(world, tmp_path):
    run = Run(world, tmp_path, keep_rollouts_gb=1e-6)
    for step in (1, 2, 3):
        part = part_path(run.folder.path, step, replica=0, num_replicas=1)
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(600))
    run.save(2)
    assert list(recorded_steps(run.folder.path)) == [2, 3]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A tmpfs with room for about one checkpoint, or None if mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_neither_the_run_nor_the_one_before(world, small_disk):
    run = Run(world, small_disk, keep=9)
    run.save(1, 0.2)
    filling = small_disk / "filling"
    run.saver.best.offer(2, scores(0.5))
    filling.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 100_000)))
    run.saver.save(2)
    run.saver.finish_saving(is_last=False)  # the save fails without an exception
    assert run.steps == [1] and not list(run.checkpoints.glob(".step_*"))
    assert run.saver.best.step == 1, "the best is one without weights"
    run.saver.save(3)
    with pytest.raises(RuntimeError, match=r"step 3 .*No space left.*2 in a row.*step_1"):
        run.saver.save(4)
    filling.unlink()
    run.save(5)
    assert run.steps == [1, 5] and checkpoint.latest(run.checkpoints) == run.checkpoints / "step_5"


def test_training_on_does_not_change_the_checkpoint_that_is_being_written(world, tmp_path, monkeypatch):
    """The thread waits until the weights have changed. The file has the old weights."""
    weight = next(world.parts.policy.gpt_models[0].parameters())
    before, gate = weight.detach().clone(), threading.Event()
    write = checkpoint_writer.write_sharded
    monkeypatch.setattr(
        checkpoint_writer, "write_sharded", lambda *arguments: (gate.wait(20), write(*arguments))[1]
    )
    run = Run(world, tmp_path)
    run.saver.save(1)
    with torch.no_grad():
        weight.add_(1.0)
    assert not run.steps
    gate.set()
    run.saver.finish_saving()
    Run(world, tmp_path)
    assert torch.equal(weight, before)


def test_no_damaged_byte_goes_unnoticed(world, tmp_path):
    """After each of 200 random changes to a random file of the newest checkpoint, the previous checkpoint is used."""
    run = Run(world, tmp_path, keep=2)
    run.save(1)
    run.save(2)
    newest, draw = run.checkpoints / "step_2", random.Random(0)
    held = {name: getattr(run.parts, name) for name in ("policy", "optimizer", "schedule")}
    files = [newest / name for name in checkpoint.files_of(newest)]
    for _ in range(200):
        path = draw.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        kind = draw.choice(["flip", "cut", "grow", "zero", "remove"])
        place = draw.randrange(len(content))
        if kind == "flip":
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del damaged[place:]
        elif kind == "grow":
            damaged.insert(place, draw.randrange(256))
        elif kind == "zero":
            damaged[place] = (damaged[place] + draw.randrange(1, 256)) % 256
        path.unlink() if kind == "remove" else path.write_bytes(damaged)
        try:
            found = checkpoint.latest(run.checkpoints)
            if found == newest and path.suffix == ".distcp":
                found, _ = checkpoint.load_newest(newest, **held)
            harmless = path.name == checkpoint.MARKER and kind == "grow" and chr(damaged[place]).isspace()
            assert found == run.checkpoints / "step_1" or harmless, (path.name, kind, place)
        finally:
            path.write_bytes(content)
    assert checkpoint.latest(run.checkpoints) == newest


def bytes_read() -> int:
    """Return the bytes that this process has read so far, from files and from the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_restart_reads_its_checkpoint_once_and_an_evaluation_the_weights_alone(world, tmp_path):
    """The model is built without reading weights. The checkpoint has 37 MB, so that other reads hardly matter."""
    model = ModelConfig(path=str(tmp_path / "model"), dtype="float32")
    parts = new_parts(world.groups, tmp_path / "model", vocab_size=24_000)
    larger = SimpleNamespace(groups=world.groups, parts=parts)
    Run(larger, tmp_path).save(1)
    path = tmp_path / "r" / "checkpoints" / "step_1"
    whole, weights = size_of(path), size_of(path / "sharded")
    assert whole == pytest.approx(3 * weights, rel=0.01) and weights > 12e6

    before = bytes_read()
    Run(larger, tmp_path)
    restart = bytes_read() - before
    assert whole < restart < 1.05 * whole

    before = bytes_read()
    policy = build_policy(
        model, ParallelConfig(), world.groups, update=None, trainable=False, with_weights=False
    )
    assert bytes_read() - before < 0.01 * weights
    checkpoint.load_weights(path, policy)
    assert weights < bytes_read() - before < 1.05 * weights


def test_a_save_does_not_read_its_tensors_back(world, tmp_path):
    run, before = Run(world, tmp_path), bytes_read()
    run.save(1)
    assert bytes_read() - before < 0.1 * size_of(run.checkpoints / "step_1")


def test_where_no_checkpoint_has_whole_tensors_the_start_is_refused_in_one_line(world, tmp_path):
    run = Run(world, tmp_path)
    run.save(1)
    path = next((run.checkpoints / "step_1").rglob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^--resume: every checkpoint in .* is damaged; --resume none starts"
    ):
        Run(world, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "vocab_size", "told"),
    [("qwen3", 250, "model_type llama (here qwen3)"), ("llama", 200, "vocab_size 250 (here 200)")],
)
def test_a_checkpoint_of_another_model_is_refused_even_where_its_shapes_fit(
    world, tmp_path, architecture, vocab_size, told
):
    """A llama model has all parameters of a qwen3 model except some norms, and both vocabularies are padded
    to 256.
    """
    run = Run(world, tmp_path / "run")
    run.save(1)
    path = run.checkpoints / "step_1"
    build_model(architecture, vocab_size=vocab_size).save_pretrained(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"), dtype="float32")
    policy = build_policy(model, ParallelConfig(), world.groups, update=None, trainable=False)
    with pytest.raises(
        ValueError, match=f"it was saved from a model with {re.escape(told)}; give the model.path"
    ):
        checkpoint.load_weights(path, policy)
    with pytest.raises(ValueError, match=re.escape(told)):
        checkpoint.load(path, policy=policy, optimizer=None, schedule=world.parts.schedule)


def test_a_checkpoint_from_before_models_were_recorded_is_loaded(world, tmp_path):
    run = Run(world, tmp_path)
    run.save(1)
    path = run.checkpoints / "step_1"
    record = json.loads((path / checkpoint.STATE).read_text())
    del record["model"]
    (path / checkpoint.STATE).write_text(json.dumps(record))
    (path / checkpoint.MARKER).unlink()
    files = checked_files.describe(path, checkpoint.files_of(path), torch.distributed.group.WORLD)
    (path / checkpoint.MARKER).write_text(json.dumps({"files": files}))
    assert Run(world, tmp_path).step == 1
    checkpoint.load_weights(path, world.parts.policy)


def test_groups_that_go_on_are_part_of_a_checkpoint_and_checked_with_it(world, tmp_path, caplog):
    is_on = PartialConfig(tokens_per_step=1, extra_prompts=1)
    run = Run(world, tmp_path, partial=is_on, group_size=1)
    prompt = Prompt(index=1, id="q", question="?", answers=("a",), tokens=(1, 2))
    turn = Turn(
        tokens=[5],
        rollout_logprobs=[-1e-17],
        observation_tokens=[6],
        calls=[Call(tool="search", arguments="x")],
        version=3,
    )
    member = Trajectory(
        prompt_index=1, prompt_id="q", sample_index=0, prompt_tokens=[1, 2], turns=[turn], stop_reason=""
    )
    group = CarriedGroup(begun=3, question=7, prompt=prompt, trajectories=[member])
    held = Carried(entries=(Entry(begun=3, index=1, question=7, engine=0),), own=(group,))
    try:
        run.parts.state.carried = held
        run.save(4)
        run.parts.state.carried = Carried()
        assert Run(world, tmp_path, partial=is_on, group_size=1).parts.state.carried == held
        is_off = Run(world, tmp_path, group_size=1, accept_changes=True)
        assert not is_off.parts.state.carried.entries
        assert "of 1 groups carried over" in caplog.text and "1 since rollout.partial is off" in caplog.text
        fewer = PartialConfig(tokens_per_step=1)
        has_fewer = Run(world, tmp_path, partial=fewer, group_size=1, accept_changes=True)
        assert not has_fewer.parts.state.carried.entries
        assert "rollout.partial is on with extra_prompts 0, max_staleness 1" in caplog.text
        path = run.checkpoints / "step_4" / "carried" / "engine_0.bin"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert checkpoint.latest(run.checkpoints) is None
    finally:
        run.parts.state.carried = Carried()


def test_without_partial_rollouts_a_checkpoint_has_no_such_file(world, tmp_path):
    run = Run(world, tmp_path)
    run.save(1)
    assert not (run.checkpoints / "step_1" / "carried").exists()
