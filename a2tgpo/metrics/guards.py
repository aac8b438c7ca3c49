"""Watch for changes in metrics that precede a collapse of the training, and decide when to stop a run.

Every step reports each alarm as a metric that is 0 or 1. Under dynamic sampling, entropy and likelihood cover only
the kept groups. Format errors are counted over all played groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from a2tgpo.config.guard import GuardConfig

CONFIRMING_STEPS = 2
"""Number of consecutive values past the limit that start an alarm, and of values within the limit that end it.
"""

NON_FINITE = "non_finite"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """The metric, the limit and the advice of one alarm."""

    metrics: tuple[str, ...]
    """Names of metrics in order of preference. The alarm watches the first one that the step reports."""
    key: str
    """Key of the setting that gives the limit. The value 0 disables the alarm. The key is "" if no setting exists."""
    threshold: float
    """Value of the setting `key`."""
    limit: Callable[[float], float]
    """Function that returns the limit for a given baseline."""
    is_floor: bool = False
    """Whether the limit is a lower bound. If False, the limit is an upper bound."""
    on_change: bool = False
    """Whether the limit depends on the baseline, which is the metric's mean over the first steps."""
    confirming_steps: int = CONFIRMING_STEPS
    advice: str
    """Text that names the likely cause and a remedy."""


class Guards:
    """Watch the metrics of one run. Ranks with the same configuration and metrics take the same decisions.

    If a step lacks an alarm's metric, or if the metric is not finite, the alarm does not change. The baseline of a
    metric is its mean over the first `baseline_steps` steps that have the metric.

    Args:
        clip_low, clip_high: the clipping range, which determines the limit for the noise of the ratio.
    """

    def __init__(self, config: GuardConfig, *, clip_low: float, clip_high: float):
        self._config = config
        alarms = _alarms(config, narrower_clip=min(clip_low, clip_high))
        self._watched = [metric for alarm in alarms.values() for metric in alarm.metrics]
        self._alarms = {name: a for name, a in alarms.items() if a.threshold > 0 or not a.key}
        self._baselines: dict[str, tuple[float, int]] = {}  # metric -> (sum, number of steps)
        self._is_on = dict.fromkeys([*self._alarms, NON_FINITE], False)
        self._contrary = dict.fromkeys(self._is_on, 0)  # consecutive steps that contradict the alarm's state
        self._streak = 0
        self._skipping = 0  # consecutive steps with a skipped update

    def watch(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Compare the metrics of one step with the limits. The metrics must be reduced over all ranks.

        Returns:
            The metrics `alarm/NAME`, and one line for each alarm that starts or ends in this step.
        """
        lines = []
        for name, alarm in self._alarms.items():
            metric = next((found for found in alarm.metrics if found in metrics), "")
            value = metrics.get(metric, math.nan)
            if not math.isfinite(value) or self._extends_baseline(alarm, metric, value):
                continue
            baseline = self._baseline(metric)
            limit = alarm.limit(baseline)
            is_past = value < limit if alarm.is_floor else value > limit
            if self._changes(name, is_past, alarm.confirming_steps):
                text = _measured(alarm, metric, value, limit, baseline)
                lines.append(_line(step, name, text, alarm.advice if is_past else None))
        broken = [name for name in self._watched if not math.isfinite(metrics.get(name, 0.0))]
        if self._changes(NON_FINITE, bool(broken), 1):
            text = ", ".join(f"{name} is {metrics[name]}" for name in broken) or "all values are finite"
            advice = "weights or rollouts are broken: go back to an earlier checkpoint with a lower update.lr"
            lines.append(_line(step, NON_FINITE, text, advice if broken else None))
        self._streak = self._streak + 1 if self.active else 0
        self._skipping = self._skipping + 1 if metrics.get("update/skipped", 0.0) > 0 else 0
        return {f"alarm/{name}": float(is_on) for name, is_on in self._is_on.items()}, lines

    @property
    def active(self) -> list[str]:
        """Names of the active alarms."""
        return [name for name, is_on in self._is_on.items() if is_on]

    @property
    def stop_is_due(self) -> bool:
        """Whether the run must stop, because too many consecutive steps had an alarm or skipped an update."""
        return 0 < self._config.stop_after <= self._streak or self._skips_too_often

    @property
    def reason(self) -> str:
        """The reason to stop the run, in a few words."""
        if self._skips_too_often:
            return (
                f"a non-finite update was skipped in {self._skipping} steps in a row "
                f"(guard.stop_after_skipped {self._config.stop_after_skipped})"
            )
        return (
            f"alarm {', '.join(self.active)}; alarms in {self._streak} steps in a row "
            f"(guard.stop_after {self._config.stop_after})"
        )

    @property
    def stop_setting(self) -> str:
        """The override that would let the run continue."""
        return "guard.stop_after_skipped=0" if self._skips_too_often else "guard.stop_after=0"

    @property
    def num_skipping(self) -> int:
        """Number of consecutive steps, up to the last step, that skipped an update."""
        return self._skipping

    @property
    def _skips_too_often(self) -> bool:
        return 0 < self._config.stop_after_skipped <= self._skipping

    def state_dict(self) -> dict:
        """Return the state that `load_state_dict` restores, in types that JSON can represent."""
        return {
            "baselines": {metric: list(taken) for metric, taken in self._baselines.items()},
            "alarms": {name: [is_on, self._contrary[name]] for name, is_on in self._is_on.items()},
            "limits": self._limits(),
            "streak": self._streak,
            "skipping": self._skipping,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore `state`, except the alarms that are now turned off or whose limit has changed.

        If such an alarm was active, the count of consecutive steps with an alarm restarts at 0.
        """
        self._baselines = {metric: (total, steps) for metric, (total, steps) in state["baselines"].items()}
        self._streak = state["streak"]
        self._skipping = state.get("skipping", 0)  # missing in states of earlier versions
        limits = self._limits()
        old_limits = state.get("limits", limits)  # missing in states of earlier versions
        for name, (is_on, contrary) in state["alarms"].items():
            if name in self._is_on and limits.get(name) == old_limits.get(name):
                self._is_on[name], self._contrary[name] = is_on, contrary
            elif is_on:
                self._streak = 0

    def _limits(self) -> dict[str, float]:
        """Return each alarm's limit for a baseline of 1. So limits of two runs differ only if settings differ."""
        return {name: alarm.limit(1.0) for name, alarm in self._alarms.items()}

    def _extends_baseline(self, alarm: Alarm, metric: str, value: float) -> bool:
        total, steps = self._baselines.get(metric, (0.0, 0))
        if not alarm.on_change or steps >= self._config.baseline_steps:
            return False
        self._baselines[metric] = (total + value, steps + 1)
        return True

    def _baseline(self, metric: str) -> float:
        total, steps = self._baselines.get(metric, (math.nan, 1))
        return total / steps

    def _changes(self, name: str, is_past: bool, confirming_steps: int) -> bool:
        """Record whether the metric was past the limit in one step. Return whether the alarm starts or ends now."""
        self._contrary[name] = 0 if is_past == self._is_on[name] else self._contrary[name] + 1
        if self._contrary[name] < confirming_steps:
            return False
        self._is_on[name], self._contrary[name] = is_past, 0
        return True


def _alarms(config: GuardConfig, *, narrower_clip: float) -> dict[str, Alarm]:
    return {
        "entropy": Alarm(
            metrics=("entropy/mean",),
            key="guard.min_entropy_share",
            threshold=config.min_entropy_share,
            limit=lambda baseline: config.min_entropy_share * baseline,
            is_floor=True,
            on_change=True,
            advice="the policy has collapsed to one behaviour: set algorithm.entropy_coef and entropy_target "
            "(docs/methods.md), lower update.lr, or raise algorithm.clip_high",
        ),
        "likelihood": Alarm(
            metrics=("likelihood/correct",),
            key="guard.max_likelihood_drop",
            threshold=config.max_likelihood_drop,
            limit=lambda baseline: baseline - config.max_likelihood_drop,
            is_floor=True,
            on_change=True,
            advice="right answers are unlearned along with wrong ones: lower update.lr, or set algorithm.kl_coef",
        ),
        "format": Alarm(
            metrics=("sampling/format_error_rate_all", "reward/format_error_rate"),
            key="guard.max_format_error_rise",
            threshold=config.max_format_error_rise,
            limit=lambda baseline: baseline + config.max_format_error_rise,
            on_change=True,
            advice="the policy forgets the protocol or runs out of tokens: read the rollouts, lower update.lr",
        ),
        "noise_floor": Alarm(
            metrics=("ratio/noise",),  # a step with few mini-batches does not have it
            key="guard.max_noise_share",
            threshold=config.max_noise_share,
            limit=lambda _: config.max_noise_share * narrower_clip,
            advice="rounding, not the policy, decides what is clipped: train in bfloat16 where model.fp8 is on, "
            "raise update.prompts_per_minibatch (one mini-batch a step clips nothing), or widen algorithm.clip_low "
            "and clip_high to twice the noise",
        ),
        "engine_gap": Alarm(
            # If no log-prob is finite, the first of these metrics is missing.
            metrics=("gap/train_engine_abs_mean", "gap/unusable_tokens"),
            key="guard.max_train_engine_gap",
            threshold=config.max_train_engine_gap,
            limit=lambda _: config.max_train_engine_gap,
            advice="the engine does not compute with the policy's precision: raise rollout.dtype, "
            "set rollout.router_replay=true for a mixture of experts, "
            "or set algorithm.correction.kind=truncate and raise guard.max_train_engine_gap",
        ),
        "failed_calls": Alarm(
            metrics=("tools/failed_rate",),
            key="guard.max_failed_calls",
            threshold=config.max_failed_calls,
            limit=lambda _: config.max_failed_calls,
            advice="the policy learns to do without a tool that fails: read the rollouts and the tool's own log",
        ),
        "outage": Alarm(
            metrics=("tools/outage_s",),
            key="",
            threshold=0.0,
            limit=lambda _: 0.0,
            confirming_steps=1,
            advice="a tool's server was out of service and the rollout waited: read the server's log",
        ),
        "skipped_updates": Alarm(
            metrics=("update/skipped",),
            key="",
            threshold=0.0,
            limit=lambda _: 0.0,
            confirming_steps=1,
            advice="loss or gradients were not finite, so the weights were left unchanged: lower update.lr",
        ),
    }


def _measured(alarm: Alarm, metric: str, value: float, limit: float, baseline: float) -> str:
    source = [f"{alarm.key} {alarm.threshold:g}"] if alarm.key else []
    source += [f"baseline {baseline:.4g}"] if alarm.on_change else []
    return f"{metric} is {value:.4g}, limit {limit:.4g}" + (f" ({', '.join(source)})" if source else "")


def _line(step: int, name: str, text: str, advice: str | None) -> str:
    if advice is None:
        return f"step {step}: alarm {name} is over: {text}"
    return f"step {step}: alarm {name}: {text}; {advice}"
