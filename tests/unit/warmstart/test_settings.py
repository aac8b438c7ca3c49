"""How a warm start changes a configuration for training: rates, number formats and use of machines."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest

from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.demonstrations import Demonstration
from a2tgpo.data.question_set import Question
from a2tgpo.io.errors import ConfigError
from a2tgpo.launch import needs
from a2tgpo.launch.run_plan import check_memory
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import make_plan
from a2tgpo.warmstart.examples import held_out_questions
from a2tgpo.warmstart.settings import as_planned, cold_model, learning_rate, source_dimensions

QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
TINY = QWEN_72B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def config_of(folder: Path, model: dict, *overrides: str) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(model))
    settings = [f"warmstart.source={folder}", "warmstart.demonstrations=d", f"model.path={folder}-warm"]
    return load_config("configs/train_70b.yaml", [*settings, *overrides])


def test_the_learning_rate_is_by_the_models_size_unless_it_is_set(tmp_path) -> None:
    large = config_of(tmp_path, QWEN_72B)
    assert learning_rate(large, source_dimensions(large)) == pytest.approx(3.3e-6, rel=0.01)
    chosen = config_of(tmp_path, QWEN_72B, "warmstart.lr=2e-6")
    assert learning_rate(chosen, source_dimensions(chosen)) == 2e-6
    adapted = config_of(tmp_path, QWEN_72B, "model.lora.rank=16")
    assert learning_rate(adapted, source_dimensions(adapted)) == pytest.approx(3.3e-5, rel=0.01)
    small = config_of(tmp_path, TINY)
    assert learning_rate(small, source_dimensions(small)) == 1e-3


def test_a_warm_start_is_in_bfloat16_unless_it_is_asked_for_fp8(tmp_path) -> None:
    fp8 = "configs/precision/fp8.yaml"
    config = config_of(tmp_path, QWEN_72B, fp8)
    assert config.model.fp8.enabled, "the training's setting"
    assert not cold_model(config).fp8.enabled
    assert cold_model(config_of(tmp_path, QWEN_72B, fp8, "warmstart.fp8=true")).fp8 == config.model.fp8


def test_a_warm_start_is_planned_without_the_engine_that_it_never_builds(tmp_path) -> None:
    """The engine's layout is invalid, and its cache would fill several GPUs."""
    engine = ["rollout.tensor_parallel=7", "rollout.kv_cache_gib=500", "rollout.quantization=none"]
    config = config_of(tmp_path, QWEN_72B, *engine)
    dimensions, gpu = source_dimensions(config), GPUS["h100-80gb"]
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel is 7"):
        make_plan(config, dimensions, gpu, gpus=64)
    plan = make_plan(as_planned(config, lr=1e-6), dimensions, gpu, gpus=64)
    (update,) = (phase for phase in plan.phases if phase.name == "update")
    assert update.fits and update.peak > 2**30
    assert not plan.fits, "an engine on one GPU would not hold the weights"
    assert check_memory(plan, has_engine=False) == ""
    with pytest.raises(ConfigError, match=r"the plan does not fit 64 x 79 GiB of GPU memory: refit takes"):
        check_memory(plan, has_engine=True)


def test_a_source_that_is_no_model_is_named_by_its_own_key(tmp_path) -> None:
    config = config_of(tmp_path, QWEN_72B, "warmstart.source=nowhere")
    with pytest.raises(ConfigError, match=r"^warmstart\.source"):
        source_dimensions(config)


Usage = namedtuple("Usage", "total used free")


def test_checkpoints_and_model_of_a_warm_start_share_the_room_on_one_disk(tmp_path, monkeypatch) -> None:
    config = as_planned(config_of(tmp_path, QWEN_72B), lr=1e-6)
    (tmp_path / "a").mkdir()
    needed = needs.warm_start_needs(
        config, target=tmp_path / "a" / "new", root=tmp_path / "runs" / "x-warmstart"
    )
    checkpoints, model = (need.num_bytes for need in needed.disk)
    assert checkpoints == pytest.approx(2 * 1.02e12, rel=0.01) and model == pytest.approx(145e9, rel=0.01)

    def faults(free: float) -> list[str]:
        monkeypatch.setattr(needs.shutil, "disk_usage", lambda folder: Usage(1e15, 0, free))
        return [fault.split(":")[0] for fault in needs.disk_faults(needed.disk)]

    assert faults(checkpoints + model) == []
    assert faults(checkpoints + model - 1) == ["model.path"]
    assert faults(checkpoints - 1) == ["run.root", "model.path"]


def test_what_is_held_out_depends_on_questions_and_seed_and_not_on_the_files_order() -> None:
    asked = [Question(id=str(i), question=f"who {i // 2}?", answers=("a",)) for i in range(200)]
    demonstrations = [Demonstration(question=question, turns=(("x", None),)) for question in asked]
    chosen = held_out_questions(demonstrations, share=0.05, seed=3)
    assert len(chosen) == 5
    assert chosen == held_out_questions(demonstrations[::-1], share=0.05, seed=3)
    assert chosen != held_out_questions(demonstrations, share=0.05, seed=4)
    assert held_out_questions(demonstrations, share=0.0, seed=3) == set()
    assert len(held_out_questions(demonstrations[:2], share=0.01, seed=3)) == 1
