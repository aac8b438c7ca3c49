"""A start is refused, or prints a warning, because of the planned memory."""

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch.run_plan import check_memory
from a2tgpo.plan.dimensions import model_dimensions
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import Plan, make_plan


def plan_of(*overrides: str, gpus: int = 8) -> Plan:
    config = load_config("configs/train_8b.yaml", overrides)
    return make_plan(config, model_dimensions("qwen3-8b")[0], GPUS["h100-80gb"], gpus=gpus)


@pytest.mark.parametrize(("margin", "is_refused"), [(None, False), (0, False), (0.01, True), (9, False)])
def test_a_plan_past_the_memory_refuses_a_start_only_beyond_the_margin(margin, is_refused):
    settings = ["rollout.gpu_memory_fraction=0.95", "update.offload=false"]
    plan = plan_of(*settings, *([] if margin is None else [f"cluster.plan_margin={margin}"]))
    excess = max(phase.peak / phase.capacity for phase in plan.phases) - 1
    assert 0.01 < excess < 0.5
    said = "the plan does not fit 8 x 79 GiB of GPU memory: "
    if not is_refused:
        assert check_memory(plan, has_engine=True).startswith(said)
        return
    with pytest.raises(ConfigError, match=f"^{said}.*; cluster.plan_margin=0 starts all the same$"):
        check_memory(plan, has_engine=True)


def test_a_plan_of_twice_the_memory_refuses_a_start_unless_the_margin_is_off():
    plan, warned = (
        plan_of(
            f"cluster.plan_margin={margin}",
            "parallel.tensor=1",
            "parallel.sequence=false",
            "rollout.tensor_parallel=1",
            gpus=1,
        )
        for margin in (0.5, 0)
    )
    with pytest.raises(ConfigError, match="does not fit 1 x 79 GiB"):
        check_memory(plan, has_engine=True)
    assert check_memory(warned, has_engine=True)


def test_a_cache_that_holds_no_sequence_is_refused_whatever_the_margin():
    with pytest.raises(ConfigError, match=r"rollout.kv_cache_gib is 0.1, too little for a cache of one"):
        check_memory(plan_of("rollout.kv_cache_gib=0.1", "cluster.plan_margin=0"), has_engine=True)


def test_a_share_whose_cache_holds_no_sequence_by_estimate_is_a_warning():
    warning = check_memory(plan_of("rollout.gpu_memory_fraction=0.1"), has_engine=True)
    assert warning.startswith("rollout.gpu_memory_fraction is 0.1, too little for a cache of one")
