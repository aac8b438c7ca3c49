"""How layers are divided among pipeline stages, and which values of `parallel` are refused."""

from __future__ import annotations

import pytest

from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "num_layers", "stages"),
    [
        ({}, 7, [7]),
        ({"pipeline": 4}, 80, [20, 20, 20, 20]),
        ({"pipeline": 4, "first_stage_layers": 19, "last_stage_layers": 19}, 80, [19, 21, 21, 19]),
        ({"pipeline": 4, "last_stage_layers": 17}, 80, [21, 21, 21, 17]),
        ({"pipeline": 2, "first_stage_layers": 3}, 8, [3, 5]),
        ({"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 5}, 8, [3, 5]),
        ({"pipeline": 2, "first_stage_layers": 2, "virtual": 2}, 8, [2, 6]),
    ],
)
def test_layers_of_stages(settings, num_layers, stages) -> None:
    assert ParallelConfig(**settings).stage_layers(num_layers) == stages


@pytest.mark.parametrize(
    ("settings", "num_layers", "fault"),
    [
        ({"pipeline": 3}, 8, "parallel.pipeline is 3"),
        (
            {"pipeline": 4, "first_stage_layers": 4},
            8,
            "leave 4 of the model's 8 layers; allowed: a multiple of the other 3",
        ),
        ({"pipeline": 2, "first_stage_layers": 8}, 8, "leave 0 of the model's 8 layers"),
        ({"pipeline": 3, "first_stage_layers": 9}, 8, "leave -1 of the model's 8 layers"),
        (
            {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 4},
            8,
            "allowed: 0, with both set and two stages",
        ),
        ({"pipeline": 2, "virtual": 3}, 8, "parallel.virtual is 3; allowed: a divisor of the 4 layers"),
        (
            {"pipeline": 2, "virtual": 2, "first_stage_layers": 3},
            8,
            "a divisor of the 3 layers of a pipeline stage",
        ),
    ],
)
def test_layers_that_cannot_be_dealt_are_refused_in_one_line(settings, num_layers, fault) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**settings).stage_layers(num_layers)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"virtual": 2}, "parallel.virtual is 2; allowed: 1 with one pipeline stage; set parallel.pipeline"),
        ({"first_stage_layers": 2}, "parallel.first_stage_layers is 2; allowed: 0 with one pipeline stage"),
        ({"last_stage_layers": -1}, "parallel.last_stage_layers is -1; allowed: >= 0"),
        ({"context": 0}, "parallel.context is 0; allowed: >= 1"),
        ({"virtual": 0}, "parallel.virtual is 0; allowed: >= 1"),
        ({"sequence": True}, "parallel.sequence is True; allowed: true only with parallel.tensor > 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, fault) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**settings)
    assert str(caught.value).startswith(fault)
