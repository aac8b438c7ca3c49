"""The line that a run prints if its GPU runs out of memory."""

from __future__ import annotations

import pytest
import torch

from a2tgpo.config.load import flat_config, load_config
from a2tgpo.config.profile import PHASES as PROFILED
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.memory import shortage
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.memory.residency import PHASES
from a2tgpo.memory.shortage import GIB, shortage_line

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 320.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.78 GiB memory in use."
)


def test_the_line_names_phase_sizes_and_settings() -> None:
    assert shortage_line(
        MESSAGE,
        phase="update",
        resident={"weights": 3 * GIB, "gradients": 6 * GIB, "KV cache": None},
        in_use={"used": 79 * GIB, "allocated": 70 * GIB, "reserved": 72 * GIB},
        total=80 * GIB,
    ) == (
        "GPU out of memory in memory phase update: 2.50 GiB requested, 1.00 of 80.00 GiB free; on the GPU: weights "
        "3.00 GiB, gradients 6.00 GiB, KV cache, other tensors 61.00 GiB, torch's cache 2.00 GiB; lower "
        "update.max_microbatch_tokens, set model.recompute=full, or raise parallel.tensor (docs/troubleshooting.md)"
    )


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_names_three_settings_that_exist(phase) -> None:
    line = shortage_line("", phase=phase, resident={}, in_use={"used": GIB}, total=GIB)
    advice = line.rpartition("; ")[2].replace("=", " ").replace(",", " ").split()
    keys = flat_config(load_config("configs/quickstart.yaml"))
    named = [word for word in advice if word in keys]
    assert len(named) == 3, line
    assert shortage._REMEDIES.keys() <= set(PHASES) and set(PROFILED) <= set(PHASES)


def test_a_shortage_ends_the_program_with_one_line(policy, capsys, monkeypatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    phases = MemoryPhases(policy)
    phases.enter("score")
    with pytest.raises(RuntimeError) as error, phases.explain_shortage():
        raise torch.OutOfMemoryError(MESSAGE)
    phases.enter("build")
    assert report_failure(error.value) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: GPU out of memory in memory phase score: 2.50 GiB requested, ")
    assert "on the GPU: weights 0.0" in line and "parallel.context" in line
