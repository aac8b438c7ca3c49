"""Impossible dimensions in a config.json are refused."""

import json

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.dimensions import read_dimensions

SIZES = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 10**400), ("hidden_size", float("inf")),
                                            ("num_hidden_layers", 10**12), ("intermediate_size", 0)])  # fmt: skip
def test_sizes_that_no_model_has_are_one_line(tmp_path, name, size):
    content = {"model_type": "qwen2", "vocab_size": 250, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_dimensions(str(tmp_path)).layers == 2
    (tmp_path / "config.json").write_text(json.dumps(content | {name: size}))
    with pytest.raises(ConfigError, match=r"config\.json.*(wrong one|not in range)") as caught:
        read_dimensions(str(tmp_path))
    assert "\n" not in str(caught.value)
