"""model/logprobs.py on one rank, compared with float64. tests/distributed/test_model_layouts.py tests two ranks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from a2tgpo.model.logprobs import token_logprobs
from a2tgpo.parallel.groups import ParallelGroups


def make(num_tokens: int, width: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_tokens, width, generator=generator) * 5
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return logits, targets, torch.randn(num_tokens, generator=generator)


def test_three_tokens_by_hand(groups: ParallelGroups) -> None:
    logits = torch.tensor(
        [[0.0, 0.0, 99.0], [1.0, 0.0, 99.0], [0.0, -2e4, 99.0]]
    )  # the third column is padding
    logprobs, entropy = token_logprobs(
        logits, torch.tensor([0, 1, 0]), vocab_size=2, tp_group=groups.tp_group
    )
    p = torch.tensor(1.0).sigmoid()
    assert torch.allclose(logprobs, torch.stack([torch.tensor(0.5).log(), (1 - p).log(), torch.tensor(0.0)]))
    assert torch.allclose(
        entropy,
        torch.stack([torch.tensor(2.0).log(), -p * p.log() - (1 - p) * (1 - p).log(), torch.tensor(0.0)]),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [1, 5, 512])
def test_values_and_gradients_equal_float64(
    groups: ParallelGroups, temperature: float, chunk_size: int
) -> None:
    logits, targets, weight = make(13, 64, 50)
    reference = logits.double().requires_grad_()
    log_probs = (reference[:, :50] / temperature).log_softmax(-1)
    expected = log_probs.gather(-1, targets[:, None])[:, 0]
    (weight * expected).sum().backward()

    before = logits.clone()
    found, entropy = token_logprobs(
        logits.requires_grad_(),
        targets,
        vocab_size=50,
        tp_group=groups.tp_group,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    (weight * found).sum().backward()
    assert torch.equal(logits, before), "logits were overwritten"
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_probs.exp() * log_probs).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    assert not logits.grad[:, 50:].any()


def test_float64_logits_pass_gradcheck_with_entropy(groups: ParallelGroups) -> None:
    logits, targets, _ = make(4, 9, 7)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            x,
            targets,
            vocab_size=7,
            tp_group=groups.tp_group,
            temperature=1.3,
            chunk_size=3,
        )

    assert torch.autograd.gradcheck(function, logits.double().requires_grad_())


@pytest.mark.parametrize("chunk_size", [3, 512])
def test_gradients_of_logprobs_and_entropy_are_those_of_a_dense_softmax(
    groups: ParallelGroups, chunk_size: int
) -> None:
    logits, targets, weight = make(13, 64, 50)
    reference = logits.double().requires_grad_()
    p = (reference[:, :50] / 0.6).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    (weight * p.gather(-1, targets[:, None])[:, 0].log() - weight.cos() * entropy).sum().backward()

    found = logits.double().requires_grad_()
    logprobs, entropy = token_logprobs(
        found, targets, vocab_size=50, tp_group=groups.tp_group, temperature=0.6, chunk_size=chunk_size
    )
    (weight * logprobs - weight.cos() * entropy).sum().backward()
    torch.testing.assert_close(found.grad, reference.grad, rtol=1e-10, atol=1e-14)


def test_no_tokens_give_no_logprobs(groups: ParallelGroups) -> None:
    logits = torch.zeros(0, 8, requires_grad=True)
    logprobs, entropy = token_logprobs(
        logits, torch.zeros(0, dtype=torch.int64), vocab_size=8, tp_group=groups.tp_group
    )
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,) and logits.grad.shape == (0, 8)


class LargestFloat32(TorchDispatchMode):
    """Number of elements of the largest float32 tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_bfloat16_logits_are_never_float32_all_at_once(groups: ParallelGroups) -> None:
    logits, targets, weight = make(64, 100, 100)
    logits = logits.bfloat16().requires_grad_()
    with LargestFloat32() as made:
        logprobs, _ = token_logprobs(logits, targets, vocab_size=100, tp_group=groups.tp_group, chunk_size=4)
        (weight * logprobs).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert made.elements == 4 * 100  # one chunk instead of 64 * 100
    torch.testing.assert_close(
        logprobs,
        logits.detach().float().log_softmax(-1).gather(-1, targets[:, None])[:, 0],
        rtol=0,
        atol=1e-5,
    )
