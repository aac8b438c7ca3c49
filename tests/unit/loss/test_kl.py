"""Compare the KL estimators and their gradients with the formulas in scalar float64 autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_by_hand import naive_kl

from a2tgpo.loss.kl import kl_penalty

ESTIMATORS = ("k1", "k2", "k3")
# d = ref - lp on both sides of the points where k3 is limited (e^d - d - 1 = 10 near d = 2.61 and d = -11), and of
# +-20.
at_the_clamps = [-1e3, -20.5, -20.0, -19.5, -11.1, -10.9, -1.0, 0.0, 1.0, 2.6, 2.7, 19.5, 20.0, 20.5, 1e3]
differences = st.one_of(st.sampled_from(at_the_clamps), st.floats(-25, 25))


def penalty_and_gradient(logprobs, ref_logprobs, estimator):
    leaf = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(leaf, torch.tensor(ref_logprobs, dtype=torch.float64), estimator)
    penalty.sum().backward()
    return penalty.detach(), leaf.grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(st.lists(st.tuples(st.floats(-20, 0), differences), min_size=1, max_size=8))
def test_penalty_and_gradient_equal_the_formula(estimator, pairs) -> None:
    logprobs, references = [a for a, _ in pairs], [a + d for a, d in pairs]
    found, gradient = penalty_and_gradient(logprobs, references, estimator)
    for k, (logprob, reference) in enumerate(zip(logprobs, references, strict=True)):
        leaf = torch.tensor(logprob, dtype=torch.float64, requires_grad=True)
        expected = naive_kl(leaf, reference, estimator) + 0.0 * leaf
        expected.backward()
        assert found[k].item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
        assert gradient[k].item() == pytest.approx(leaf.grad.item(), rel=1e-12, abs=1e-12)


def test_gradients_are_those_of_the_estimators() -> None:
    """Computed by hand at d = ref - lp = 0.5: 1, -d and 1 - e^d."""
    expected = {"k1": 1.0, "k2": -0.5, "k3": 1.0 - 1.6487212707001282}
    for estimator in ESTIMATORS:
        _, gradient = penalty_and_gradient([-1.0], [-0.5], estimator)
        assert gradient.item() == pytest.approx(expected[estimator], rel=1e-12)


def test_k3_past_its_bound_has_no_gradient() -> None:
    penalty, gradient = penalty_and_gradient([-1.0, -1.0], [2.0, -15.0], "k3")
    assert penalty.tolist() == [10.0, 10.0] and gradient.tolist() == [0.0, 0.0]


@given(st.floats(-20, 0), differences)
def test_k2_and_k3_are_non_negative_and_zero_at_equality(logprob, difference) -> None:
    for estimator in ("k2", "k3"):
        (apart, same), _ = penalty_and_gradient([logprob] * 2, [logprob + difference, logprob], estimator)
        assert apart >= 0 and same == 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_samples_of_the_policy_estimates_the_divergence(estimator) -> None:
    """The estimate is exact if every outcome is weighted by its probability."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    divergence = (policy * (policy / reference).log()).sum()
    estimate = (policy * kl_penalty(policy.log(), reference.log(), estimator)).sum()
    torch.testing.assert_close(estimate, divergence)


def test_the_mean_gradient_of_k1_is_zero_and_that_of_k2_is_the_divergences() -> None:
    """Therefore k1 is refused as a penalty. The mean is exact, because it is taken over all outcomes of a softmax. No
    gradient flows through the sampling.
    """
    logits = torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.4, 0.1, 0.2, 0.3]).double().log()

    def mean_gradient(estimator):
        logprobs = logits.log_softmax(0)
        mean = (logprobs.detach().exp() * kl_penalty(logprobs, reference, estimator)).sum()
        return torch.autograd.grad(mean, logits)[0]

    logprobs = logits.log_softmax(0)
    (divergence,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    assert divergence.abs().max() > 0.1
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros(4).double())
    torch.testing.assert_close(mean_gradient("k2"), divergence)
