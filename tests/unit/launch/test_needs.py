"""What a program needs from its machines."""

from __future__ import annotations

import pytest
import torch

from a2tgpo.config.profile import ProfileConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.needs import check_profiling


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be profiled")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": ("update",)}, "profile.memory is ['update']; allowed: [] here, since torch sees no GPU"),
        ({"tool": "nsys"}, "profile.tool is 'nsys'; allowed: torch here, since torch sees no GPU"),
    ],
)
def test_a_profile_of_a_gpu_is_refused_without_one(settings, message) -> None:
    check_profiling(ProfileConfig(steps=(1,)))
    with pytest.raises(ConfigError) as error:
        check_profiling(ProfileConfig(steps=(1,), **settings))
    assert str(error.value) == message
