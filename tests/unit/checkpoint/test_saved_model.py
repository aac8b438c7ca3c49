import json

import pytest

from a2tgpo.checkpoint.find import find_model
from a2tgpo.io.errors import ConfigError


@pytest.fixture
def checkpoints(tmp_path):
    for step in (2, 10, 30):
        (tmp_path / f"step_{step}").mkdir()
        if step != 30:  # an interrupted save
            (tmp_path / f"step_{step}" / "complete.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    return tmp_path


def test_a_path_is_a_checkpoint_a_folder_of_them_or_a_hugging_face_folder(checkpoints):
    assert find_model(checkpoints / "step_2").step == 2
    assert find_model(checkpoints).path == checkpoints / "step_10"
    hf = find_model(checkpoints / "hf")
    assert hf.is_hf and hf.label == "hf"


def test_best_is_the_one_that_best_json_names(checkpoints):
    best = checkpoints / "best.json"
    best.write_text(json.dumps({"step": 2, "score": 0.5, "metric": "em"}))
    assert find_model(checkpoints / "best").path == checkpoints / "step_2"
    best.write_text(json.dumps({"step": 0, "score": 0.5, "metric": "em"}))
    assert find_model(checkpoints / "best", untrained=checkpoints / "hf").is_hf


@pytest.mark.parametrize(
    ("name", "best", "message"),
    [
        ("none", None, "none does not exist; give a Hugging Face folder"),
        ("step_30", None, "has neither config.json nor complete.json"),
        ("best", None, "cannot read .*best.json"),
        ("best", "[]", "best.json is damaged"),
        ("best", '{"step": 1e999}', "best.json is damaged"),
        ("best", '{"step": 7}', "step_7 does not exist"),
    ],
)
def test_anything_else_is_refused_in_one_line(checkpoints, name, best, message):
    if best:
        (checkpoints / "best.json").write_text(best)
    with pytest.raises(ConfigError, match=message) as caught:
        find_model(checkpoints / name)
    assert "\n" not in str(caught.value)
