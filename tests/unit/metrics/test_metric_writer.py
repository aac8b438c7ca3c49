import io
import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from a2tgpo.metrics.writer import MetricWriter, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def scalars(run_dir, name):
    return [(event.step, event.value) for event in board(run_dir).Scalars(name)]


def test_steps_are_lines_and_scalars_and_terminal_text(tmp_path):
    stream = io.StringIO()
    writer = MetricWriter(tmp_path, total_steps=2, stream=stream)
    writer.log(1, {"reward/mean": 0.25, "loss": math.inf, "speed/tokens_per_s": 12345.6})
    writer.log(2, {"reward/mean": 0.5})
    assert lines(tmp_path)[0] == {"step": 1, "reward/mean": 0.25, "loss": None, "speed/tokens_per_s": 12345.6}
    writer.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 0.25), (2, 0.5)]
    assert scalars(tmp_path, "loss") == [(1, math.inf)]
    assert stream.getvalue() == "step 1/2  reward 0.250  tok/s 12,346  left 0:00:00\nstep 2/2  reward 0.500\n"


def test_calls_for_one_step_make_one_line_and_steps_never_fall(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=3, stream=io.StringIO())
    writer.log(0, {"evaluation/em": 0.5})
    writer.log(1, {"a": 1.0})
    writer.log(1, {"b": 2.0, "a": 3.0})
    assert lines(tmp_path) == [{"step": 0, "evaluation/em": 0.5}, {"step": 1, "a": 3.0, "b": 2.0}]
    with pytest.raises(ValueError, match="step 0 after those of step 1"):
        writer.log(0, {"a": 1.0})
    writer.log(2, {"a": 4.0})
    writer.close()
    assert [record["step"] for record in lines(tmp_path)] == [0, 1, 2]


def test_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=9, stream=io.StringIO())
    for step in (1, 2, 3, 4):
        writer.log(step, {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 5, "lo')
    writer = MetricWriter(tmp_path, total_steps=9, resume_step=2, stream=io.StringIO())
    writer.log(2, {"evaluation/em": 1.0})
    writer.log(3, {"loss": 30.0})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "evaluation/em": 1.0},
        {"step": 3, "loss": 30.0},
    ]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_resuming_without_earlier_metrics_starts_empty(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=9, resume_step=2, stream=io.StringIO())
    writer.log(3, {"loss": 1.0})
    writer.close()
    assert lines(tmp_path) == [{"step": 3, "loss": 1.0}]


def test_new_run_in_a_used_folder_sets_the_old_records_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        writer = MetricWriter(tmp_path, total_steps=1, stream=io.StringIO())
        writer.log(1, {"loss": value})
        writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 3.0}]
    assert scalars(tmp_path, "loss") == [(1, 3.0)]
    assert lines(tmp_path / "previous_1") == [{"step": 1, "loss": 1.0}]
    assert scalars(tmp_path / "previous_2", "loss") == [(1, 2.0)]


def test_histograms_text_and_layout_reach_tensorboard(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=1, stream=io.StringIO())
    writer.log_histogram(1, "gain/turn_1", [0.0, 1.0, math.nan, 3.0])
    writer.log_histogram(1, "gain/turn_2", [])
    writer.log_text(1, "rollouts", "<think>\n``` </think>")
    writer.close()
    events = board(tmp_path)
    assert events.Histograms("gain/turn_1")[0].histogram_value.num == 3
    assert "gain/turn_2" not in events.Tags()["histograms"]
    text = events.Tensors("rollouts/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"    <think>\n    ``` </think>"
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"gain by turn" in layout


def test_hyperparameters_reach_tensorboard_and_write_no_value(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=1, stream=io.StringIO())
    writer.log_hyperparameters({"update.lr": 1e-6, "run.name": "x", "a.flag": True}, ["evaluation/em"])
    writer.log(1, {"evaluation/em": 0.5})
    writer.close()
    assert scalars(tmp_path, "evaluation/em") == [(1, 0.5)]
    events = board(tmp_path)
    found = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert found.plugin_name == "hparams" and b"update.lr" in found.content
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []


def test_a_plain_line_says_how_long_it_will_take(tmp_path, monkeypatch):
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr("a2tgpo.metrics.writer.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    writer = MetricWriter(tmp_path, total_steps=300, resume_step=2, stream=stream)
    writer.log(3, {"reward/em": 0.5})
    writer.log(4, {"reward/em": 0.5})
    writer.close()
    assert stream.getvalue().splitlines() == [
        "step 3/300  EM 0.500  left 2:28:30",
        "step 4/300  EM 0.500  left 2:28:00",
    ]


def test_progress_line_shows_rewards_and_estimate(tmp_path):
    stream = Terminal()
    writer = MetricWriter(tmp_path, total_steps=4, resume_step=1, stream=stream)
    writer.log(2, {"reward/mean": 0.25, "reward/em": 0.5})
    writer.print("evaluated")
    writer.close()
    shown = stream.getvalue()
    assert "step 2/4" in shown
    assert "reward=0.250, EM=0.500" in shown
    assert "left" in shown
    assert "\nevaluated\n" in shown or "\revaluated\n" in shown


def test_other_ranks_touch_nothing(tmp_path):
    writer = MetricWriter(tmp_path / "run", total_steps=1, enabled=False)
    writer.log(1, {"a": 1.0})
    writer.log_histogram(1, "h", [1.0])
    writer.log_text(1, "t", "x")
    writer.print("x")
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [
        "rubbish",
        "[1]",
        "[" * 5000,
        '{"reward/mean": 0.5}',
        '{"step": "one"}',
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 1, "reward/mean": "high"}',
        '{"step": 1, "reward/mean": {"a": 1}}',
    ],
    ids=lambda line: line[:24],
)
def test_broken_line_inside_the_file_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": null}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2: not a record of a step"):
        read_metrics(path)
