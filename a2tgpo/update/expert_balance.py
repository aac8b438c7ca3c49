"""Metrics of how evenly the experts of a mixture are used."""

from __future__ import annotations

from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.policy import Policy


def balance_metrics(policy: Policy) -> MetricSums:
    """Return metrics of the training passes since the last call, or no metrics if the model has no experts.

    Every rank must call this. The load of a layer is the number of tokens of its busiest expert, divided by the mean
    over its experts. A load of 1 is perfect balance, and the largest possible load is the number of experts divided
    by the number of experts that a token chooses.

    - `experts/layer_N_load` is the load of layer N, counted from 1.
    - `experts/load_mean` and `experts/load_max` are the mean and the maximum over the layers.
    - `experts/idle_share` is the share of experts, over all layers, that got no token.
    - `experts/balance_loss` is the balancing loss without its weight, if the update has this loss: the mean over
      layers and passes, which is 1 if every trajectory uses all experts evenly.
    """
    metrics = MetricSums()
    if policy.expert_load is None:
        return metrics
    counts = policy.expert_load.take()
    if not counts.any():
        return metrics
    if policy.router_balance is not None:
        metrics.add("experts/balance_loss", *policy.router_balance.take())
    loads = (counts.amax(1) / counts.mean(1)).tolist()
    for number, load in enumerate(loads, start=1):
        metrics.add(f"experts/layer_{number}_load", load, 1)
    metrics.add("experts/load_mean", sum(loads), len(loads))
    metrics.add_max("experts/load_max", max(loads))
    metrics.add("experts/idle_share", float((counts == 0).sum()), counts.numel())
    return metrics
