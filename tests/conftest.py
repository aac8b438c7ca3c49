"""Settings of all tests: one thread per process, and hypothesis with reproducible examples."""

import gc
import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "PET_LOCAL_ADDR", "127.0.0.1"
)  # torchrun reads this variable; the machine's own name may have no address
# The processes that tests start must import this checkout and the modules that tests share.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
)

gc.disable()  # until the test files have imported their libraries; see a2tgpo/lifecycle/garbage.py

import pytest
from hypothesis import settings
from preloaded import VARIABLE
from preloaded.session import Session
from taught import share

SLOW = (
    *("distributed/", "e2e/", "faults/", "unit/environment/test_python_tool.py"),
    *("unit/environment/test_mcp_tool.py", "unit/evaluate/test_evaluate.py", "unit/test_hostile_input.py"),
    *("unit/docs/test_documentation.py", "unit/launch/test_local_ranks.py", "unit/launch/test_rendezvous.py"),
    *("unit/memory/", "unit/metrics/test_metric_sums.py", "unit/metrics/test_run_tools.py"),
    *("unit/model/test_policy_on_one_rank.py", "unit/refit/"),
    *("unit/rollout/test_engine_quantization.py", "unit/rollout/test_engine_work.py"),
    *("unit/rollout/test_gpu_", "unit/rollout/test_multi_turn.py", "unit/rollout/test_partial.py"),
    *("unit/rollout/test_vllm_engine.py", "unit/run/", "unit/search/test_http_client.py"),
    *("unit/search/test_retrieval_", "unit/test_preloaded.py", "unit/test_wheel.py", "unit/tools/"),
    "unit/warmstart/test_rejection.py",
)
"""Tests that start engines, servers or programs, or take more than a few seconds. `make check` leaves them out."""
LONGEST = (
    *(
        "e2e/test_slurm.py",
        "e2e/test_user_path.py",
        "distributed/test_methods.py",
        "distributed/test_update.py",
    ),
    *("distributed/test_lockstep.py", "e2e/test_train.py", "unit/rollout/test_gpu_model_runner.py"),
    *(
        "distributed/test_experts.py",
        "distributed/test_transformer_engine.py",
        "unit/tools/test_gpu_check.py",
    ),
    *("distributed/test_preflight.py", "distributed/test_advantage_ranks.py", "e2e/test_mpi.py"),
    *("distributed/test_refit.py", "e2e/test_bad_input.py"),
)
"""The files that take longest, in the order in which they start, so that no long file is left for the end."""


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # a worker of pytest-xdist uses its controller's server
    if not is_worker:
        session = Session()
        config.add_cleanup(session.close)
        os.environ[VARIABLE] = session.python
        if (folder := share()) is not None:
            config.add_cleanup(folder.cleanup)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which no test is chosen, because importing them takes time."""
    chosen = {"slow": True, "not slow": False}.get(config.option.markexpr)
    if chosen is None or collection_path.suffix != ".py":
        return None
    is_slow = collection_path.relative_to(TESTS).as_posix().startswith(SLOW)
    return True if is_slow != chosen else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {item: item.path.relative_to(TESTS).as_posix() for item in items}
    for item, file in files.items():
        if file.startswith(SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: LONGEST.index(files[item]) if files[item] in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()  # end without a last search for garbage


settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
