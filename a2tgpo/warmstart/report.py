"""Report a warm start: a progress line, metrics, and a closing line."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.metrics.writer import MetricWriter
from a2tgpo.trajectory import Trajectory


class Report:
    """Reports the progress of a warm start.

    Args:
        folder: the folder of the warm start.
        out: the folder of the resulting model, for the closing line.
        steps: the number of steps in the whole warm start.
        step: the number of steps done before this start.
        enabled: True on rank 0. The other ranks report nothing.
    """

    def __init__(self, folder: Path, *, out: str, steps: int, step: int, enabled: bool) -> None:
        self._folder, self._out, self._steps, self._enabled = folder, out, steps, enabled
        # The writer's own progress line is about rollouts, so send it to a stream that nobody reads.
        self._writer = MetricWriter(
            folder, total_steps=steps, enabled=enabled, resume_step=step or None, stream=io.StringIO()
        )
        self._bar: Any = tqdm(
            total=steps,
            initial=step,
            disable=not enabled,
            desc="warm start",
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
        )
        self._losses: list[float] = []
        self._held_out: list[float] = []
        self._num_tokens = 0
        self._start = self._last = time.perf_counter()

    def add(
        self, step: int, chosen: Sequence[Trajectory], *, loss: float, grad_norm: float, lr: float
    ) -> None:
        """Record the metrics of `step`, which trained on the demonstrations `chosen`."""
        now = time.perf_counter()
        num_tokens = sum(trajectory.num_tokens for trajectory in chosen)
        self._losses.append(loss)
        self._num_tokens += num_tokens
        speed, self._last = num_tokens / (now - self._last), now
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": speed}
        self._writer.log(step, {f"warmstart/{name}": value for name, value in metrics.items()})
        self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def add_held_out(self, step: int, loss: float) -> None:
        """Record `loss`, the held-out loss of the model after `step` steps."""
        self._held_out.append(loss)
        self._writer.log(step, {"warmstart/held_out_loss": loss})
        self._last = time.perf_counter()

    def say_begin(self, text: str) -> None:
        if self._enabled:
            self._bar.write(text, file=sys.stderr)

    def say_done(self) -> None:
        """Print the closing line of a finished warm start."""
        if not self._enabled:
            return
        self._bar.close()
        seconds = self._last - self._start
        learned = f"loss {_first_to_last(self._losses)}, " if self._losses else ""
        held_out = f"held out {_first_to_last(self._held_out)}, " if self._held_out else ""
        print(
            f"warm start: {len(self._losses)} steps in {seconds:.0f} s "
            f"({self._num_tokens / max(seconds, 1e-9):,.0f} tokens/s), {learned}{held_out}saved to {self._out}",
            flush=True,
        )

    def say_stopped(self, step: int, reason: str) -> None:
        """Print that the warm start stopped early for `reason`."""
        if self._enabled:
            self._bar.close()
            saved = f"saved as {self._folder}/checkpoints/step_{step}" if step else "nothing to save yet"
            print(
                f"stopped after step {step} of {self._steps}: {reason}; {saved}; the next start continues from "
                "there "
                f"(exit code {START_AGAIN})",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def _first_to_last(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} -> {values[-1]:.3f}"
