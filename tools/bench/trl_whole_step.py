"""Run whole training steps of TRL's GRPOTrainer on the task of a configuration of this project.

    .venv-trl/bin/python -m torch.distributed.run --nproc-per-node 2 tools/bench/trl_whole_step.py REQUEST ANSWER

whole_step.py starts this program with torchrun in .venv-trl. Questions, prompts, search, observations, budgets and
rewards come from this project. `rollout_func` plays the trajectories with transformers' generate. All trajectories of
a rank generate until the slowest has ended its turn. Then all search. For each turn, the function `generate` computes
the whole context again. Each step has two updates, as in the configuration. TRL computes the old policy's log-probs
before the first update.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from a2tgpo.config.load import load_config
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_mix import load_question_mix
from a2tgpo.data.sampler import PromptSampler
from a2tgpo.data.template import PromptSet, PromptTemplate, today
from a2tgpo.environment.tool import ToolError, build_tools
from a2tgpo.protocol.build import build_protocol
from a2tgpo.protocol.protocol import CallResult
from a2tgpo.reward.episode import reader_of
from a2tgpo.reward.load import build_rewards
from a2tgpo.reward.score import TrajectoryReward
from a2tgpo.reward.total import judge
from a2tgpo.trajectory import LogProbs, Prompt, TokenIds, Trajectory, Turn


class TimedTrainer(GRPOTrainer):
    """A GRPOTrainer that records each stage's wall time. The stage `score` computes log-probs without gradients."""

    seconds: dict[str, float]

    def _timed(self, stage: str, call: Any, *args: Any, **further: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **further)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    def _generate(self, prompts: list) -> Any:
        return self._timed("rollout", super()._generate, prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return self._timed("prepare", super()._generate_and_score_completions, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **further: Any) -> Any:
        stage = "forward" if torch.is_grad_enabled() else "score"
        return self._timed(stage, super()._get_per_token_logps_and_entropies, *args, **further)


class Clock(TrainerCallback):
    """The wall seconds of every whole step and of its stages. A whole step has `updates` optimizer steps."""

    def __init__(self, trainer: TimedTrainer, player: Player, updates: int):
        self.steps: list[dict[str, float]] = []
        self._trainer, self._player, self._updates = trainer, player, updates
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates == 0:
            self._trainer.seconds = {}
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates:
            return
        step, taken = time.perf_counter() - self._start, self._trainer.seconds
        self.steps.append(
            {
                "rollout": taken["rollout"],
                "score": taken["score"],
                "update": step - taken["prepare"],
                "other": taken["prepare"] - taken["rollout"] - taken["score"],
                "step": step,
                "sampled_tokens": self._player.num_sampled,
                "tokens": self._player.num_tokens,
            }
        )


class Player:
    """Play groups of trajectories turn by turn, with transformers' generate."""

    def __init__(self, config: RunConfig, tokenizer: Any, prompts: list[Prompt]):
        self._config, self._tokenizer, self._prompts = config, tokenizer, prompts
        self._toolset = build_tools(config)
        self._search: Any = self._toolset.tools["search"]
        self._protocol = build_protocol(config, tokenizer, schemas=self._toolset.schemas, date=today())
        self._rewards = build_rewards(config)
        self.num_sampled = self.num_tokens = 0

    def play(self, numbers: list[str], trainer: TimedTrainer) -> dict[str, list | None]:
        """Play one trajectory for each prompt number in `numbers`. TRL calls this as its `rollout_func`."""
        played = [
            Trajectory(
                prompt_index=0,
                prompt_id=number,
                sample_index=sample,
                prompt_tokens=TokenIds(self._prompts[int(number)].tokens),
                turns=[],
                stop_reason="",
            )
            for sample, number in enumerate(numbers)
        ]
        texts: list[list[str]] = [[] for _ in played]
        model = trainer.accelerator.unwrap_model(trainer.model)
        live = list(range(len(played)))
        while live:
            sampled = self._generate(model, [played[i] for i in live])
            live = [
                i
                for i, tokens in zip(live, sampled, strict=True)
                if self._goes_on(played[i], texts[i], tokens)
            ]
        reward = TrajectoryReward(reader=reader_of(self._protocol))
        for trajectory, text in zip(played, texts, strict=True):
            episode = reward.begin(trajectory, self._prompts[int(trajectory.prompt_id)], text, [])
            reward.finish(trajectory, judge(self._rewards, episode, format_gate=True))
        self.num_sampled = sum(t.num_sampled_tokens for t in played)
        self.num_tokens = sum(t.num_tokens for t in played)
        return {
            "prompt_ids": [t.prompt_tokens.tolist() for t in played],
            "completion_ids": [t.tokens[len(t.prompt_tokens) :].tolist() for t in played],
            "env_mask": [
                [
                    is_sampled
                    for turn in t.turns
                    for is_sampled in [1] * len(turn.tokens) + [0] * len(turn.observation_tokens)
                ]
                for t in played
            ],
            "logprobs": None,
            "outcome": [t.outcome_reward for t in played],
        }

    def _generate(self, model: Any, live: list[Trajectory]) -> list[list[int]]:
        """Generate one turn of each trajectory. A turn includes the end-of-sequence token if it was sampled."""
        contexts = [t.tokens for t in live]
        longest, end = max(map(len, contexts)), self._tokenizer.eos_token_id
        tokens = torch.tensor([[*[end] * (longest - len(context)), *context] for context in contexts])
        mask = torch.tensor([[0] * (longest - len(context)) + [1] * len(context) for context in contexts])
        with torch.no_grad():
            generated = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=min(self._config.rollout.max_turn_tokens, max(map(self._room, live))),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                stop_strings=list(self._protocol.stop_strings),
                tokenizer=self._tokenizer,
                pad_token_id=end,
            )
        return [
            self._cut(row[longest:].tolist(), self._room(t)) for row, t in zip(generated, live, strict=True)
        ]

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """Remove a generated row's padding, and cut the turn to `room` tokens.

        The padding id is the end-of-sequence id. Keep one such id at the end, unless a stop string ended the turn.
        """
        end = self._tokenizer.eos_token_id
        before = tokens[: tokens.index(end)] if end in tokens else tokens
        text = self._tokenizer.decode(before)
        is_stopped = len(before) == len(tokens) or any(stop in text for stop in self._protocol.stop_strings)
        return (before if is_stopped else [*before, end])[:room]

    def _room(self, trajectory: Trajectory) -> int:
        response = trajectory.num_tokens - len(trajectory.prompt_tokens)
        return self._config.rollout.max_response_tokens - response

    def _goes_on(self, trajectory: Trajectory, texts: list[str], tokens: list[int]) -> bool:
        """Append a turn with the sampled tokens and its observation. Return whether another turn follows."""
        text = self._protocol.text_of(tokens)
        texts.append(text)
        turn = Turn(tokens=TokenIds(tokens), rollout_logprobs=LogProbs())
        trajectory.turns.append(turn)
        stop = "</search>" if text.endswith("</search>") else None
        calls = self._protocol.parse(text, finish_reason="stop", stop_string=stop).calls
        # An observation must leave room for 32 more tokens, as in this project's rollout.
        room = self._room(trajectory) - 32
        if (
            not calls
            or room < self._protocol.min_observation_tokens(len(calls))
            or trajectory.num_process_turns >= self._config.rollout.max_turns
        ):
            return False
        (call,) = calls
        try:
            result = CallResult(call=call, parts=tuple(self._search.call(call.arguments)))
        except ToolError as error:
            result = CallResult(call=call, error=str(error))
        turn.calls = [call]
        turn.observation_tokens = TokenIds(self._protocol.observe([result], room=room).tokens)
        return True


def train(request: dict[str, Any]) -> list[dict[str, float]]:
    """Train, and return each stage's seconds and the numbers of tokens, for every whole step on this rank."""
    config = load_config(request["config"], request["overrides"])
    rollout, update = config.rollout, config.update
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, padding_side="left")
    template = PromptTemplate(tokenizer, config.data.instructions)
    questions = load_question_mix(config.data.train_files).questions
    sampler = PromptSampler(len(questions), rollout.prompts_per_step, config.run.seed)
    drawn = [index for _ in range(config.run.steps) for index in sampler.next_indices()]
    prompt_set = PromptSet(
        [questions[index] for index in drawn], template, max_prompt_tokens=config.data.max_prompt_tokens
    )
    player = Player(config, tokenizer, prompt_set.prompts(range(len(drawn))))
    updates = rollout.prompts_per_step // update.prompts_per_minibatch
    size = update.prompts_per_minibatch * rollout.group_size // request["ranks"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=config.run.steps * updates,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=1,
                steps_per_generation=updates,
                num_generations=rollout.group_size,
                shuffle_dataset=False,
                loss_type="grpo",
                learning_rate=update.lr,
                lr_scheduler_type="constant",
                weight_decay=update.weight_decay,
                max_grad_norm=update.clip_grad,
                use_cpu=True,
                ddp_backend="gloo",
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(drawn))]}),
            processing_class=tokenizer,
            reward_funcs=lambda outcome, **_: outcome,
            rollout_func=player.play,
        )
        clock = Clock(trainer, player, updates)
        trainer.add_callback(clock)
        trainer.train()
    return clock.steps


def main() -> None:
    torch.set_num_threads(1)
    request, answer = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    steps = train(request)
    # Sum tokens over all ranks. Use the times of rank 0, because rank 0 waits for the other ranks in every update.
    for step in steps:
        for name in ("sampled_tokens", "tokens"):
            total = torch.tensor(float(step[name]))
            torch.distributed.all_reduce(total)
            step[name] = total.item()
    if torch.distributed.get_rank() == 0:
        answer.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
