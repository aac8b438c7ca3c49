"""A part of the fault table, which tools/fault_table.py runs as a whole: real runs ended at points of the step."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain import BROKEN, HANG_S, REQUEUED, WATCHED, Fault, run_chain, steps_needed
from harness import Row, start, write_inputs

FAULTS = [
    Fault("kill", "rollout", 0, call=5),
    Fault("kill", "update", 1, call=2),
    Fault("kill", "save: written", 1),
    Fault("usr1", "rollout", 1, REQUEUED, call=5),
    Fault("term", "update", 0, REQUEUED),
    Fault("hang", "exchange", 1, BROKEN, overrides=WATCHED, within_s=HANG_S),
]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    root = tmp_path_factory.mktemp("faults")
    config, steps = write_inputs(root), steps_needed(FAULTS)
    whole = start(config, "run.name=whole", f"run.steps={steps}")
    assert whole.code == 0, whole.output[-3000:]
    found = run_chain(config, "chain", FAULTS, Path(root) / "whole", steps=steps, damage=True)
    for rank in (0, 1):  # the hang's, which later starts leave alone
        stacks = (root / "chain" / "stacks" / f"rank_{rank}.txt").read_text()
        assert f"rank {rank} is in exchange" in stacks and "trainer.py" in stacks
    return found


@pytest.mark.parametrize("number", range(len(FAULTS) + 1))
def test_the_job_ends_with_one_message_and_the_next_start_goes_on_bit_for_bit(rows, number):
    assert rows[number].passed, rows[number]
