"""Run one update of TRL's GRPOTrainer on given trajectories. train_step.py starts this program in .venv-trl.

    .venv-trl/bin/python tools/bench/trl_train_step.py REQUEST ANSWER

The program uses TRL's own training loop: `rollout_func` supplies the trajectories, and `env_mask` masks observations.
Advantages are given per token instead of per sequence. A batch has only one update, so all ratios are 1, and loss and
gradient equal those of the turn-level loss. TRL's gradient checkpointing is disabled, because the other variants do
not use it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

Rows = list[dict[str, list]]
"""One dict per trajectory. `prompt` and `completion` are token ids. `env_mask` is 1 at sampled tokens, else 0.
`advantages` has a value per token."""


class GivenAdvantages(GRPOTrainer):
    """A GRPOTrainer with advantages from the request instead of rewards."""

    rows: Rows

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        padded = torch.zeros(batch["completion_ids"].shape)
        for number, row in enumerate(self.rows):
            padded[number, : len(row["advantages"])] = torch.tensor(row["advantages"])
        return batch | {"advantages": padded}


class Clock(TrainerCallback):
    """The CPU seconds of each optimizer step, counted from the step's first micro-batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def train(request: dict[str, Any]) -> dict[str, float]:
    """Run two updates, the first as a warm-up on the shortest trajectory. Return the results of the second update."""
    rows, settings = request["rows"], request["update"]
    batches = [[rows[0]] * len(rows), rows]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    clock = Clock()

    def play(prompts: list[str], trainer: GivenAdvantages) -> dict[str, list | None]:
        trainer.rows = batches[trainer.state.global_step]
        assert len(prompts) == len(trainer.rows), "a prompt for each trajectory"
        return {
            "prompt_ids": [row["prompt"] for row in trainer.rows],
            "completion_ids": [row["completion"] for row in trainer.rows],
            "env_mask": [row["env_mask"] for row in trainer.rows],
            "logprobs": None,
        }

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=len(rows) // request["num_microbatches"],
            gradient_accumulation_steps=request["num_microbatches"],
            num_generations=len(rows),
            loss_type="grpo",
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            adam_beta1=settings["adam_beta1"],
            adam_beta2=settings["adam_beta2"],
            adam_epsilon=settings["adam_eps"],
            weight_decay=settings["weight_decay"],
            max_grad_norm=settings["clip_grad"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GivenAdvantages(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["?"]}),
            processing_class=AutoTokenizer.from_pretrained(request["model"], padding_side="left"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            rollout_func=play,
            callbacks=[clock],
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry][-1]
    return {"seconds": clock.seconds[-1], "loss": logged["loss"], "grad_norm": logged["grad_norm"]}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = Path(sys.argv[2])
    torch.set_num_threads(1)
    peak = measure.peak_megabytes(lambda: answer.write_text(json.dumps(train(request)), encoding="utf-8"))
    found = json.loads(answer.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(found | {"peak": peak}), encoding="utf-8")


if __name__ == "__main__":
    main()
