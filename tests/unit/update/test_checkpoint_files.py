from __future__ import annotations

import random

import numpy as np
import torch

from a2tgpo.checkpoint.folder import _from_plain, steps_in, to_plain


def test_random_states_survive_a_file_that_is_loaded_without_pickled_classes(tmp_path) -> None:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": None,
        "tracker": {"model-parallel-rng": torch.get_rng_state()},
    }
    torch.save(to_plain(state), tmp_path / "rng.pt")
    drawn = random.random(), np.random.rand(), torch.rand(1)
    back = _from_plain(torch.load(tmp_path / "rng.pt", weights_only=True))
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    torch.set_rng_state(back["torch"])
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert back["cuda"] is None and back["tracker"].keys() == state["tracker"].keys()


def test_steps_are_sorted_by_number_and_other_names_are_ignored(tmp_path) -> None:
    for name in ("step_9", "step_10", "step_100.tmp", "step_11.old", "notes", "step_x"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [10, 9]
    assert steps_in(tmp_path / "absent") == []
