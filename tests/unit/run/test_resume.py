"""What a resumed run does, reports and refuses if its questions or settings have changed."""

from __future__ import annotations

import logging

import pytest
from saved_run import Questions, Run, world

from a2tgpo.collect.carried_pool import Carried, Held
from a2tgpo.config.rollout import GainConfig, PartialConfig
from a2tgpo.data.question_set import Question
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet
from a2tgpo.io.errors import ConfigError
from a2tgpo.rollout.carried_group import CarriedGroup
from a2tgpo.run.resume import find_record, follow_settings, require_same_run
from a2tgpo.trajectory import Call, Prompt, Trajectory, Turn

__all__ = ["world"]

IS_ON = PartialConfig(tokens_per_step=1, extra_prompts=4)


class Template:
    def render_many(self, questions: list[str]) -> list[tuple[int, ...]]:
        return [tuple(question.encode()) for question in questions]


def questions(*pairs: tuple[str, str], answer: str = "a") -> PromptSet:
    members = [Question(id=name, question=text, answers=(answer,)) for name, text in pairs]
    return PromptSet(members, Template(), max_prompt_tokens=99)  # type: ignore[arg-type]


def test_the_fingerprint_of_questions_is_that_of_ids_and_texts_in_order() -> None:
    one, two = ("1", "who?"), ("2", "why?")
    known = questions(one, two).fingerprint
    assert questions(one, two).fingerprint == known
    assert questions(one, two, answer="another").fingerprint == known
    others = [(two, one), (one, ("2", "how?")), (one, ("3", "why?")), (one,), (("1w", "ho?"), two)]
    assert len({known, *(questions(*pairs).fingerprint for pairs in others)}) == 6


@pytest.mark.parametrize("saved", ["other", "same", "", None])
def test_other_questions_of_the_same_number_are_refused_in_one_line(saved: str | None) -> None:
    state = PromptSampler(10, 2, 0, fingerprint=saved or "").state_dict()
    if saved is None:  # a state of an earlier version
        del state["fingerprint"]
    sampler = PromptSampler(10, 2, 0, fingerprint="same")
    if saved != "other":
        sampler.load_state_dict(state)
        return
    with pytest.raises(
        ConfigError, match=r"data\.train differs from the questions of the checkpoint"
    ) as caught:
        sampler.load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_questions_is_refused_before_anything_is_built(world, tmp_path) -> None:
    run = Run(world, tmp_path)
    run.save(3)
    found = find_record(run.config, "auto")
    assert found is not None and found[0] == run.checkpoints / "step_3"
    hf_config = run.parts.policy.hf_config
    require_same_run(*found, hf_config, PromptSampler(10, 2, seed=0, fingerprint="q"))
    with pytest.raises(ConfigError, match=r"data\.train differs from the questions"):
        require_same_run(*found, hf_config, PromptSampler(10, 2, seed=0, fingerprint="r"))


def test_a_run_from_the_checkpoint_of_another_says_which_settings_differ(world, tmp_path, caplog) -> None:
    other = Run(world, tmp_path, name="other", max_turns=6)
    other.save(3)
    Run(world, tmp_path, max_turns=4, temperature=0.5, resume=str(other.checkpoints / "step_3"))
    (line,) = [r.getMessage() for r in caplog.records if "starts with other settings" in r.getMessage()]
    assert line.endswith("step_3: rollout.temperature 1.0 -> 0.5, rollout.max_turns 6 -> 4")


def test_a_run_that_has_trained_goes_on_with_other_settings_only_if_that_is_accepted(
    world, tmp_path, caplog
) -> None:
    Run(world, tmp_path, max_turns=6)
    Run(world, tmp_path, max_turns=5).save(3)  # allowed, because nothing was trained before
    with pytest.raises(ConfigError, match=r"at step 3; .* rollout\.max_turns 5 -> 4\. .*--accept-changes"):
        Run(world, tmp_path, max_turns=4)
    assert "since its last start" not in caplog.text
    run = Run(world, tmp_path, max_turns=4, accept_changes=True)
    assert run.step == 3 and "since its last start: rollout.max_turns 5 -> 4" in caplog.text
    caplog.clear()
    Run(world, tmp_path, max_turns=4, keep=2)
    assert "since its last start: checkpoint.keep 1 -> 2" in caplog.text
    kept = sorted(path.name for path in run.folder.path.glob("config.*.yaml"))
    assert kept == [f"config.{number}.yaml" for number in range(1, 5)]
    text = (run.folder.path / "config.yaml").read_text()
    assert text == (run.folder.path / "config.4.yaml").read_text() != (run.folder.path / kept[0]).read_text()


def test_a_best_score_on_other_held_out_questions_is_forgotten(world, tmp_path, caplog) -> None:
    run = Run(world, tmp_path)
    run.save(3, em=0.9)
    assert Run(world, tmp_path).best_step == 3
    try:
        world.parts.test_sets = Questions("other")
        assert Run(world, tmp_path).best_step is None
        assert "the evaluation questions have changed since step 3" in caplog.text
    finally:
        world.parts.test_sets = Questions("t")


def carried_group(*reasons: str, tokens: tuple[int, ...] = (1, 2), tool: str = "search") -> CarriedGroup:
    turn = Turn(
        tokens=[5],
        rollout_logprobs=[-1.0],
        observation_tokens=[6],
        calls=[Call(tool=tool, arguments="x")],
        version=3,
    )
    prompt = Prompt(index=1, id="q", question="?", answers=("a",), tokens=tokens)
    members = [
        Trajectory(
            prompt_index=1,
            prompt_id="q",
            sample_index=i,
            prompt_tokens=[1, 2],
            turns=[turn],
            stop_reason=reason,
        )
        for i, reason in enumerate(reasons)
    ]
    return CarriedGroup(begun=3, question=7, prompt=prompt, trajectories=members)


@pytest.mark.parametrize(
    ("group", "changed", "reason"),
    [
        (carried_group("", "answer"), (), ""),
        (carried_group(), (), ""),
        (carried_group("", "", ""), (), "started with rollout.group_size 3, which is now 2"),
        (
            carried_group("", "", tokens=(9,)),
            (),
            "whose prompt has changed (data.instructions, the chat",
        ),
        (carried_group("", "", tool="calculator"), (), "that call calculator, which tools.names lacks"),
        (carried_group("", ""), ("rollout.gain.measure",), ""),
        (carried_group("", "answer"), ("rollout.gain.measure",), "scored with another rollout.gain.measure"),
        (carried_group("", "answer"), ("rollout.gain.verify_every", "run.steps"), ""),
    ],
)
def test_carried_groups_that_settings_of_now_rule_out_are_dropped_with_a_reason(
    world,
    tmp_path,
    group,
    changed,
    reason,
) -> None:
    config = Run(world, tmp_path, partial=IS_ON, group_size=2).config
    held = [Held(engine=0, group=group)]
    kept, dropped = follow_settings(held, config=config, prompts=Questions("q"), changed=changed)  # type: ignore[arg-type]
    if not reason:
        assert kept == held and not dropped
    else:
        assert not kept and len(dropped) == 1 and next(iter(dropped)).startswith(reason)


def test_a_run_that_goes_on_with_less_drops_what_it_cannot_carry_and_says_so(
    world,
    tmp_path,
    caplog,
) -> None:
    run = Run(world, tmp_path, partial=IS_ON, group_size=2)
    group = carried_group("", "answer")
    try:
        run.parts.state.carried = Carried(own=(group,))
        run.save(4)
        with caplog.at_level(logging.WARNING):
            kept = Run(
                world, tmp_path, partial=IS_ON, group_size=2, max_response_tokens=32, accept_changes=True
            ).parts.state.carried
        assert [len(member.turns) for member in kept.own[0].trajectories] == [0, 1]
        assert not kept.entries[0].is_complete and "are dropped" not in caplog.text
        gain = GainConfig(measure="log_probability")
        other = Run(world, tmp_path, partial=IS_ON, group_size=2, gain=gain, accept_changes=True)
        assert not other.parts.state.carried.entries
        assert (
            "of 1 groups carried over" in caplog.text
            and "1 scored with another rollout.gain.measure" in caplog.text
        )
    finally:
        run.parts.state.carried = Carried()
