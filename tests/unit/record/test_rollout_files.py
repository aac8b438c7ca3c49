import contextlib
import json
import logging
import math

import pytest
import torch
import zstandard
from tiny_models import build_tokenizer

from a2tgpo.record.rollout_files import part_path, read_part, read_step, recorded_steps, write_part
from a2tgpo.record.rollout_writer import RolloutWriter
from a2tgpo.trajectory import Call, Trajectory, Turn

RECORDS = [
    {"prompt_index": index // 2, "sample_index": index % 2, "turns": [], "text": f"Zürich {index}"}
    for index in range(4)
]


def test_one_changed_bit_of_recorded_rollouts_is_found(tmp_path):
    path = part_path(tmp_path, 1, replica=0, num_replicas=1)
    write_part(RECORDS, path)
    assert read_part(path) == RECORDS
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):  # the frame's header has unused bits
            assert read_part(path) == RECORDS
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="replica_0_of_1"):
        read_part(path)


def test_parts_of_a_step_are_read_in_the_order_of_prompts_and_samples(tmp_path):
    write_part(RECORDS[1::2], part_path(tmp_path, 3, replica=0, num_replicas=2))
    assert recorded_steps(tmp_path) == {}  # a part is missing
    write_part(RECORDS[::2], part_path(tmp_path, 3, replica=1, num_replicas=2))
    steps = recorded_steps(tmp_path)
    assert list(steps) == [3] and read_step(steps[3]) == RECORDS


def test_a_step_written_again_by_fewer_replicas_or_another_version_is_the_newest_one(tmp_path):
    old = tmp_path / "rollouts" / "step_1.jsonl.zst"
    old.parent.mkdir()
    old.write_bytes(zstandard.ZstdCompressor().compress(json.dumps(RECORDS[0]).encode() + b"\n"))
    assert read_step(recorded_steps(tmp_path)[1]) == RECORDS[:1]
    for replica in range(4):
        write_part(RECORDS[replica : replica + 1], part_path(tmp_path, 1, replica=replica, num_replicas=4))
    assert read_step(recorded_steps(tmp_path)[1]) == RECORDS and not old.exists()
    write_part(RECORDS[2:], part_path(tmp_path, 1, replica=0, num_replicas=1))
    assert read_step(recorded_steps(tmp_path)[1]) == RECORDS[2:]


def played(sample: int, tokenizer) -> Trajectory:
    turns = [
        Turn(
            tokens=tokenizer.encode("<search> Peru"),
            rollout_logprobs=[-0.125] * len(tokenizer.encode("<search> Peru")),
            observation_tokens=tokenizer.encode(" Lima"),
            calls=[Call(tool="search", arguments="Peru")],
            info_gain=0.1,
        ),
        Turn(tokens=tokenizer.encode("Lima"), rollout_logprobs=[-0.5] * len(tokenizer.encode("Lima"))),
    ]
    return Trajectory(
        prompt_index=0,
        prompt_id="é",
        sample_index=sample,
        prompt_tokens=tokenizer.encode("Capital of Peru?"),
        turns=turns,
        stop_reason="answer",
    )


def test_what_the_thread_writes_holds_tokens_texts_and_values_of_each_turn(tmp_path):
    tokenizer = build_tokenizer()
    trajectories = [played(0, tokenizer), played(1, tokenizer)]
    advantages = torch.tensor([[0.25, math.nan], [-1.0, 0.5]], dtype=torch.float64)
    writer = RolloutWriter(tmp_path, replica=0, num_replicas=1, tokenizer=tokenizer)
    writer.start(7, trajectories, {"advantage": advantages})
    writer.wait()
    first, second = read_step(recorded_steps(tmp_path)[7])
    assert [turn["advantage"] for turn in first["turns"] + second["turns"]] == [0.25, None, -1.0, 0.5]
    assert first["turns"][0]["tokens"] == tokenizer.encode("<search> Peru")
    assert first["turns"][0]["rollout_logprobs"][0] == -0.125
    assert [first["prompt_text"], first["turns"][0]["text"], first["turns"][0]["observation_text"]] == [
        "Capital of Peru?",
        "<search> Peru",
        " Lima",
    ]
    restored = {name: first["turns"][0][name] for name in ("query", "info_gain", "tool_failed", "version")}
    assert restored == {"query": "Peru", "info_gain": 0.1, "tool_failed": False, "version": 0}


def test_rollouts_that_cannot_be_written_cost_a_warning_and_are_counted_once(tmp_path, caplog):
    tokenizer = build_tokenizer()
    writer = RolloutWriter(tmp_path, replica=0, num_replicas=1, tokenizer=tokenizer)
    (tmp_path / "rollouts").write_text("")  # a file instead of a folder
    with caplog.at_level(logging.WARNING):
        writer.start(1, [played(0, tokenizer)], {})
        writer.wait()
    assert (
        "could not record the rollouts of step 1" in caplog.text and str(tmp_path / "rollouts") in caplog.text
    )
    (tmp_path / "rollouts").unlink()
    writer.start(2, [played(0, tokenizer)], {})
    writer.wait()
    assert list(recorded_steps(tmp_path)) == [2]
    assert (writer.take_failures(), writer.take_failures()) == (1, 0)
