"""Compute a fingerprint of the weights that depends on every bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from a2tgpo.model.lora import is_adapter
from a2tgpo.model.policy import Policy, gather_weights

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_fingerprint(policy: Policy) -> str:
    """Return a hexadecimal digest of the names, shapes, dtypes and values of this rank's parameters.

    Every rank must call this. The values are hashed as sums of their bit patterns along the first and the last axis,
    so only these sums leave the device. The digest does not detect deliberate collisions.
    """
    gather_weights(policy)
    return _fingerprint(policy, lambda _name: True)


@torch.no_grad()
def base_fingerprint(policy: Policy) -> str:
    """Return the digest of `weights_fingerprint` for this rank's parameters except those of adapters."""
    return _fingerprint(policy, lambda name: not is_adapter(name))


def _fingerprint(policy: Policy, is_hashed: Callable[[str], bool]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for number, chunk in enumerate(policy.chunks):
        for name, parameter in chunk.named_parameters():
            if not is_hashed(name):
                continue
            bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
            digest.update(f"{number} {name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            for axis in {0, bits.dim() - 1}:
                digest.update(bits.sum(axis, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
