"""The state in which a turn was written, as a number that is equal wherever the state is (GiGPO's anchor)."""

import hashlib
from array import array
from collections.abc import Sequence

from a2tgpo.trajectory import Trajectory

NO_STATE = -1
"""Where a trajectory has no such turn."""


def turn_states(trajectory: Trajectory) -> list[int]:
    """Key of the state of every turn, in [0, 2^63), equal in all processes for equal states.

    The first turn is written in the prompt. A later one is written in what the environment shows: the query of the
    turn before (in lower case, spaces squeezed) and the tokens that answered it. What else the policy has written,
    and how many turns it took, is no part of the state: so turns of different rollouts can meet. States of
    different prompts differ.
    """
    prompt = str(trajectory.prompt_index)
    states = [_key(prompt, ())]
    for turn in trajectory.turns:
        if turn.query is not None:
            query = " ".join(turn.query.casefold().split())
            states.append(_key(f"{prompt} {query}", turn.observation_tokens))
    return states[: len(trajectory.turns)]  # one that was cut after an observation wrote nothing in the last


def _key(text: str, tokens: Sequence[int]) -> int:
    encoded = text.encode()
    # The length keeps the text apart from the tokens behind it.
    digest = hashlib.blake2b(len(encoded).to_bytes(8, "little") + encoded, digest_size=8)
    digest.update(array("q", tokens))
    return int.from_bytes(digest.digest(), "big") >> 1  # within a signed 64-bit number
