"""Compute a key for the state in which a turn was written (GiGPO's anchor)."""

import hashlib
from array import array
from collections.abc import Sequence

from a2tgpo.trajectory import Trajectory

NO_STATE = -1
"""The key in the columns past a trajectory's last turn."""


def turn_states(trajectory: Trajectory) -> list[int]:
    """Return a key in [0, 2^63) for the state of each turn. Equal states have equal keys in all processes.

    The first turn's state is the prompt. A later turn's state consists of the arguments of the previous turn's calls
    (in lower case, with single spaces) and the observation that followed. States of different prompts differ.
    """
    prompt = str(trajectory.prompt_index)
    states = [_key(prompt, ())]
    for turn in trajectory.turns:
        if turn.is_process:
            queries = " ".join(" ".join(call.arguments for call in turn.calls).casefold().split())
            states.append(_key(f"{prompt} {queries}", turn.observation_tokens))
    # If a trajectory was cut after an observation, no turn follows the last state.
    return states[: len(trajectory.turns)]


def _key(text: str, tokens: Sequence[int]) -> int:
    encoded = text.encode()
    # Hash the text's length too, because it marks where the text ends and the tokens begin.
    digest = hashlib.blake2b(len(encoded).to_bytes(8, "little") + encoded, digest_size=8)
    digest.update(array("q", tokens))
    return (
        int.from_bytes(digest.digest(), "big") >> 1
    )  # The shift keeps the key within a signed 64-bit number.
