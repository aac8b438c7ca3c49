"""What `run.deterministic` sets, and what it refuses. Whole runs are compared in tests/e2e/test_train.py."""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import build_model

from a2tgpo.config.load import load_config
from a2tgpo.config.model import ModelConfig
from a2tgpo.config.parallel import ParallelConfig
from a2tgpo.io.errors import ConfigError
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.transformer_config import transformer_config
from a2tgpo.parallel.determinism import (
    ENGINE_NCCL_VARIABLES,
    ENGINE_VARIABLE,
    VARIABLES,
    compute_deterministically,
)


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """After the test, undo what it changed in this process."""
    environment = dict(os.environ)
    for name in (*VARIABLES, ENGINE_VARIABLE):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_it_sets_the_variables_and_the_mode_of_torch_and_of_megatron(tmp_path: Path) -> None:
    build_model("qwen3", vocab_size=64).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), dtype="float32")

    def megatron_is_deterministic() -> bool:
        config = transformer_config(
            load_hf_config(model.path), model, ParallelConfig(), transformer_engine=False
        )
        return config.deterministic_mode

    assert not megatron_is_deterministic()
    for _ in range(2):  # a second call changes nothing
        compute_deterministically()
        assert {name: os.environ[name] for name in VARIABLES} == VARIABLES
    assert torch.are_deterministic_algorithms_enabled() and megatron_is_deterministic()
    assert ENGINE_VARIABLE not in os.environ, "vLLM's batch-invariant kernels need a GPU"


def test_a_variable_with_another_value_is_refused_and_nothing_is_set() -> None:
    os.environ["NCCL_ALGO"] = "Tree"
    with pytest.raises(
        ConfigError, match=r"NCCL_ALGO is 'Tree'; allowed with run.deterministic=true: 'Ring'"
    ):
        compute_deterministically()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), True), ((9, 0), False)])
def test_an_engine_on_a_card_whose_kernels_have_no_backward_pass_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    compute_deterministically(with_engine=False)
    assert ENGINE_VARIABLE not in os.environ
    if is_refused:
        with pytest.raises(ConfigError, match=r"allowed: false on a card \(compute capability 8\.\d\)"):
            compute_deterministically()
    else:
        compute_deterministically()
    assert os.environ.get(ENGINE_VARIABLE) == (None if is_refused else "1")


def test_vllm_replaces_linear_only_on_older_cards_and_sets_known_variables() -> None:
    """The refusal of older cards and the list of variables follow from vLLM's code, which may change."""
    batch_invariant = pytest.importorskip("vllm.model_executor.determinism.batch_invariant")
    replaced = inspect.getsource(batch_invariant.enable_batch_invariant_mode)
    older, newer = replaced.split("is_device_capability_family(", 1)[1].split("else:", 2)[:2]
    assert older.strip().startswith("80") and "aten::linear" in older and "aten::matmul" in older
    assert "aten::" not in newer.split("elif")[0], "from 9.0 on vLLM replaces no matrix product"
    changed = inspect.getsource(batch_invariant.override_envs_for_invariance)
    assert set(re.findall(r'"(NCCL_\w+)"', changed)) == set(ENGINE_NCCL_VARIABLES)


def test_a_nucleus_is_refused() -> None:
    root = Path(__file__).parents[3]
    with pytest.raises(ConfigError, match=r"rollout.top_p is 0.9; allowed: 1 with run.deterministic=true"):
        load_config(root / "configs/quickstart.yaml", ["run.deterministic=true", "rollout.top_p=0.9"])
