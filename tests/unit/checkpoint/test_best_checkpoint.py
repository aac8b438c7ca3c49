"""Which checkpoint is the best, that it is kept, and how a resumed run knows it. The checkpoints are really saved, in
one process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
from saved_run import Run, best_of, scores, world

from a2tgpo.assemble import build_checkpoints
from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.best import BEST_FILE, BestCheckpoint
from a2tgpo.checkpoint.find import find_model
from a2tgpo.checkpoint.writer import CheckpointWriter
from a2tgpo.config.evaluation import EvaluationConfig
from a2tgpo.config.guard import GuardConfig
from a2tgpo.lifecycle.outage import Outage
from a2tgpo.lifecycle.stop_request import Stop
from a2tgpo.metrics.guards import Guards
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.trainer import Trainer

__all__ = ["world"]


# -- the record ----------------------------------------------------------------------------------------------


def test_only_a_higher_score_is_better_and_a_tie_keeps_the_earlier(tmp_path):
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    answers = [best.offer(step, scores(em)) for step, em in enumerate([0.2, 0.5, 0.5, 0.4, 0.6], start=1)]
    assert answers == [True, True, False, False, True]
    assert best.state_dict() == {"step": 5, "score": 0.6, "metric": "em", "standard_error": 0.0}


def test_a_score_is_better_by_more_than_the_standard_error_of_the_difference(tmp_path):
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    assert best.offer(1, scores(0.5, error=0.03))
    assert not best.offer(2, scores(0.549, error=0.04)) and not best.offer(3, scores(0.4, error=0.5))
    assert best.offer(4, scores(0.551, error=0.04))
    assert best.state_dict() == {"step": 4, "score": 0.551, "metric": "em", "standard_error": 0.04}
    assert "0.551 ± 0.040" in best.describe()


def test_a_best_from_before_standard_errors_is_gone_on_with(tmp_path):
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    best.load_state_dict({"step": 1, "score": 0.5, "metric": "em"})
    assert not best.offer(2, scores(0.52, error=0.03)) and best.offer(3, scores(0.54, error=0.03))


def test_the_score_that_counts_is_the_configured_one(tmp_path):
    best = BestCheckpoint(tmp_path, "f1", is_writer=True)
    assert best.offer(1, scores(0.2)) and not best.offer(2, scores(0.5)) and best.offer(3, scores(0.1))


@pytest.mark.parametrize("of_set", ["", "nq/"])
def test_a_reward_that_did_not_judge_all_answers_is_never_the_best(tmp_path, of_set):
    best = BestCheckpoint(tmp_path, f"{of_set}judge", is_writer=True)
    judged = {f"{of_set}judge": 1.0, f"{of_set}standard_error_judge": 0.0}
    assert not best.offer(1, judged | {f"{of_set}num_unjudged": 3.0})
    assert best.offer(2, judged | {"other/num_unjudged": 3.0})
    em = BestCheckpoint(tmp_path, "em", is_writer=True)
    assert em.offer(1, scores(0.5) | {"num_unjudged": 3.0})


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    assert not best.offer(1, scores(math.nan)) and best.step is None
    assert best.offer(2, scores(0.0)) and not best.offer(3, scores(math.nan))


def test_none_keeps_no_best(tmp_path):
    best = BestCheckpoint(tmp_path, "none", is_writer=True)
    assert not best.offer(0, scores(0.2)) and not best.offer(1, scores(0.5))
    best.write()
    assert best_of(tmp_path) is None and best.describe() == "none"


def test_the_untrained_policy_is_the_best_until_beaten_without_a_checkpoint(tmp_path):
    best = BestCheckpoint(tmp_path / "checkpoints", "em", is_writer=True)
    assert not best.offer(0, scores(0.3))
    assert best_of(tmp_path / "checkpoints") == {
        "step": 0,
        "score": 0.3,
        "metric": "em",
        "standard_error": 0.0,
    }
    assert "untrained" in best.describe() and "0.300" in best.describe()
    assert not best.offer(1, scores(0.3)) and best.offer(2, scores(0.31))


def test_only_the_writer_writes(tmp_path):
    best = BestCheckpoint(tmp_path, "em", is_writer=False)
    best.offer(0, scores(0.3))
    best.write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "is_kept"),
    [
        ({"step": 4, "score": 0.5, "metric": "em", "standard_error": 0.0}, True),
        ({"step": 0, "score": 0.5, "metric": "em", "standard_error": 0.0}, True),
        ({"step": 4, "score": 0.5, "metric": "f1", "standard_error": 0.0}, False),
        (None, False),
    ],
    ids=["own metric", "untrained", "another metric", "none"],
)
def test_a_record_of_the_same_metric_is_gone_on_with(tmp_path, state, is_kept):
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    best.load_state_dict({"step": 1, "score": 0.9, "metric": "em", "standard_error": 0.0})
    best.load_state_dict(state)
    assert best.state_dict() == (state if is_kept else None)
    assert best.offer(5, scores(0.4)) == (not is_kept)


def test_only_a_complete_checkpoint_has_weights_and_the_untrained_policy_needs_none(tmp_path):
    for step in (3, 4):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "step_4" / checkpoint.MARKER).write_text("{}")
    best = BestCheckpoint(tmp_path, "em", is_writer=True)
    assert {step: best.has_weights(step) for step in (0, 2, 3, 4)} == {0: True, 2: False, 3: False, 4: True}


# -- the run's folder ----------------------------------------------------------------------------------------


def test_the_best_checkpoint_outlives_the_newest_ones_until_it_is_beaten(world, tmp_path):
    run = Run(world, tmp_path, keep=1)
    seen = []
    for step, em in [(1, 0.5), (2, None), (3, 0.2), (4, 0.6), (5, None)]:
        run.save(step, em)
        seen.append((run.steps, run.best_step))
    assert seen == [([1], 1), ([1, 2], 1), ([1, 3], 1), ([4], 4), ([4, 5], 4)]
    assert best_of(run.checkpoints) == {"step": 4, "score": 0.6, "metric": "em", "standard_error": 0.0}


def test_a_resumed_run_knows_its_best_and_its_alarms(world, tmp_path):
    first = Run(world, tmp_path)
    first.save(1, 0.5)
    first.guards.watch(2, {"update/skipped": 1.0})
    first.save(2)
    (first.checkpoints / BEST_FILE).unlink()
    second = Run(world, tmp_path)
    assert second.step == 2 and second.guards.stop_is_due
    assert best_of(second.checkpoints) == {"step": 1, "score": 0.5, "metric": "em", "standard_error": 0.0}
    assert not second.saver.best.offer(3, scores(0.5))


def test_a_best_of_the_dropped_future_is_forgotten_and_its_checkpoint_set_aside(world, tmp_path):
    first = Run(world, tmp_path, keep=3)
    for step, em in [(1, 0.2), (2, None), (3, 0.9)]:
        first.save(step, em)
    second = Run(world, tmp_path, keep=2, resume=str(first.checkpoints / "step_2"))
    assert second.step == 2 and second.steps == [1, 2] and second.best_step == 1
    assert (second.checkpoints / "dropped_1" / "step_3" / checkpoint.MARKER).exists()
    second.save(3, 0.3)
    assert second.steps == [2, 3] and second.best_step == 3
    third = Run(world, tmp_path, resume=str(second.checkpoints / "step_2"))
    # Retention removed step 1, the best step in the checkpoint's record, so the next evaluation becomes the best.
    assert third.steps == [2] and third.best_step is None
    assert (third.checkpoints / "dropped_2" / "step_3").exists()
    third.save(3, 0.1)
    assert third.best_step == 3


def test_the_best_of_another_run_is_not_taken_over(world, tmp_path):
    other = Run(world, tmp_path, name="other")
    other.save(1, 0.9)
    own = Run(world, tmp_path, name="own", resume=str(other.checkpoints / "step_1"))
    assert own.step == 1 and own.best_step is None
    own.save(2, 0.1)
    assert own.best_step == 2 and other.steps == [1] and other.best_step == 1


NO_ANSWERS = {
    "tokenizer": None,
    "rollout": SimpleNamespace(answer_tokens=None, outage=Outage(limit_s=1)),
    "reward": None,
    "train_prompts": SimpleNamespace(questions=[], content_fingerprint=""),
    "reward_pool": None,
}
"""Parts of a run that plays nothing."""


class ScriptedTrainer(Trainer):
    """The real training loop, with steps that skip every update, and evaluations whose score is the number of the
    step.
    """

    def train_step(self) -> dict[str, float]:
        self.step += 1
        return {"update/skipped": 1.0}

    def evaluate(self) -> bool:
        return self.checkpoints.best.offer(self.step, scores(self.step / 10))


@pytest.mark.parametrize(("every", "best", "steps"), [(2, 4, [4]), (3, 3, [3, 4]), (0, None, [4])])
def test_a_run_that_its_guards_stop_is_evaluated_first_where_that_is_due(world, tmp_path, every, best, steps):
    run = Run(world, tmp_path)
    evaluation = EvaluationConfig(every=every, at_start=False)
    config = dataclasses.replace(run.config, evaluation=evaluation)
    parts: Any = SimpleNamespace(**{**vars(run.parts), "config": config, **NO_ANSWERS})
    guards = Guards(GuardConfig(stop_after=4), clip_low=0.1, clip_high=0.1)
    recorder, checkpoints = run.folder.recorder(None, step=0), build_checkpoints(parts, run.folder, guards)
    trainer = ScriptedTrainer(parts, recorder, checkpoints, guards, folder=run.folder)
    assert not trainer.train() and trainer.step == 4
    assert run.best_step == best and run.steps == steps


class DyingTrainer(ScriptedTrainer):
    def train_step(self) -> dict[str, float]:
        raise RuntimeError("a rank was killed")


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_begins_elsewhere_and_is_killed_soon_begins_there_again(world, tmp_path, step):
    other = Run(world, tmp_path, name="other")
    other.save(step)
    run = Run(world, tmp_path, name="own", resume=str(other.checkpoints / f"step_{step}"))
    parts: Any = SimpleNamespace(**{**vars(run.parts), **NO_ANSWERS})
    recorder = run.folder.recorder(None, step=step)
    trainer = DyingTrainer(parts, recorder, run.saver, run.guards, folder=run.folder, step=step)
    with pytest.raises(RuntimeError, match="a rank was killed"):
        trainer.train()
    run.saver.finish_saving()  # the thread ends, even if the program fails
    again = Run(world, tmp_path, name="own")
    assert again.step == step and again.steps == [step]
    (again.checkpoints / BEST_FILE).write_text(json.dumps({"step": step}))
    found = find_model(again.checkpoints / "best", untrained="unused")
    assert found.path == again.checkpoints / f"step_{step}"


def test_an_evaluation_reserves_the_time_of_the_longest_save(world, tmp_path, monkeypatch):
    run = Run(world, tmp_path)
    parts: Any = SimpleNamespace(**{**vars(run.parts), **NO_ANSWERS})
    recorder, checkpoints = (
        run.folder.recorder(None, step=0),
        build_checkpoints(parts, run.folder, run.guards),
    )
    needed: list[float] = []
    stop: Any = SimpleNamespace(should_stop=lambda needed_s: needed.append(needed_s))
    trainer = Trainer(parts, recorder, checkpoints, run.guards, folder=run.folder, stop=stop)

    def evaluate(*_: Any, stop: Stop, **__: Any) -> dict[str, float]:
        stop.should_stop()
        return scores(0.5) | {"num_questions": 1.0}

    monkeypatch.setattr("a2tgpo.trainer.evaluate", evaluate)
    monkeypatch.setattr(Trainer, "_refit", lambda self: MetricSums())
    checkpoints._writer.longest_s = 1200.0
    trainer.evaluate()
    assert needed == [1200.0]


def test_resuming_from_elsewhere_sets_aside_the_own_checkpoint_of_the_same_step(world, tmp_path):
    """Otherwise a run that ends before its next checkpoint would continue from its own checkpoint."""
    first = Run(world, tmp_path, keep=3)
    for step in (1, 2, 3):
        first.save(step)
    second = Run(world, tmp_path, resume=str(first.checkpoints / "step_2"))
    assert second.steps == [1, 2]
    third = Run(world, tmp_path, keep=3, resume=str(first.checkpoints / "dropped_1" / "step_3"))
    third.save(4)
    assert third.step == 3 and third.steps == [1, 2, 4]
    other = Run(world, tmp_path, name="other")
    other.save(2)
    fourth = Run(world, tmp_path, resume=str(other.checkpoints / "step_2"))
    assert fourth.step == 2 and fourth.steps == [1] and other.steps == [2]
    assert sorted(p.name for p in (first.checkpoints / "dropped_2").iterdir()) == ["step_2", "step_4"]


def test_a_reader_of_the_runs_settings_never_sees_half_a_file(world, tmp_path):
    run = Run(world, tmp_path, keep=1)
    old = {name: (run.folder.path / name).read_text() for name in ("config.yaml", "env.1.txt")}
    readers = {name: (run.folder.path / name).open() for name in old}
    Run(world, tmp_path, keep=2)
    for name, reader in readers.items():
        with reader:
            is_replaced = os.fstat(reader.fileno()).st_ino != (run.folder.path / name).stat().st_ino
            assert is_replaced == (name == "config.yaml") and reader.read() == old[name]
    assert (run.folder.path / "config.yaml").read_text() != old["config.yaml"]
    left = sorted(p.name for p in run.folder.path.iterdir())
    assert left == [
        *("config.1.yaml", "config.2.yaml", "config.yaml"),
        *("date.txt", "env.1.txt", "env.2.txt", "holder.json"),
    ]


def test_a_run_begun_anew_forgets_the_best_that_has_no_checkpoint(world, tmp_path):
    first = Run(world, tmp_path)
    first.saver.best.offer(0, scores(0.3))
    assert first.best_step == 0
    second = Run(world, tmp_path)
    assert second.step == 0 and second.best_step is None


def test_a_checkpoint_without_guards_and_best_is_resumed_from(world, tmp_path):
    root = tmp_path / "r" / "checkpoints"
    parts = world.parts
    writer = CheckpointWriter(root, timeout_s=60)
    writer.start(
        5,
        policy=parts.policy,
        optimizer=parts.optimizer,
        schedule=parts.schedule,
        state={"step": 5, "sampler": parts.state.sampler.state_dict()},
        on_complete=lambda: None,
    )
    assert writer.wait() == ""
    run = Run(world, tmp_path)
    assert run.step == 5 and run.best_step is None and not run.guards.active
