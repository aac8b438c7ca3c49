import contextlib

from a2tgpo.config.check import ConfigError
from a2tgpo.config.load import flat_config, load_config
from a2tgpo.rollout_log import best_and_worst, write_records
from tools.view_rollouts import read_records


def record(name, reward, *gains):
    return {"name": name, "outcome_reward": reward, "turns": [{"info_gain": gain} for gain in gains]}


RECORDS = [record("a", 0.0, 0.5, None), record("b", 1.0, 0.1), record("c", -1.0), record("d", 1.0, 0.3)]


def names(count):
    return {name: chosen["name"] for name, chosen in best_and_worst(RECORDS, count).items()}


def test_half_are_the_best_half_the_worst_and_none_is_shown_twice():
    assert names(0) == {}
    assert names(1) == {"best_0": "d"}
    assert names(2) == {"best_0": "d", "worst_0": "c"}
    assert names(8) == {"best_0": "d", "best_1": "b", "best_2": "a", "best_3": "c"}
    assert names(5) == {"best_0": "d", "best_1": "b", "best_2": "a", "worst_0": "c"}
    assert best_and_worst([], 4) == {}


def test_a_configuration_has_one_value_a_key():
    flat = flat_config(load_config("configs/quickstart.yaml"))
    assert flat["rollout.gain.measure"] == "probability" and flat["run.steps"] == 32
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_one_changed_bit_of_a_step_of_rollouts_is_found(tmp_path):
    path = tmp_path / "step_1.jsonl.zst"
    write_records(RECORDS, path)
    assert read_records(path) == RECORDS
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(ConfigError):  # the frame's header has bits that say nothing
            assert read_records(path) == RECORDS
