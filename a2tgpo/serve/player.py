"""The parts that are needed to play a trained policy: the engine, the tools and the rollout, without the trainer."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from a2tgpo.assemble import build_engine, build_rollout, build_run_protocol
from a2tgpo.checkpoint import folder as checkpoint
from a2tgpo.checkpoint.find import SavedModel, find_model
from a2tgpo.config.load import load_config, overridden_keys
from a2tgpo.config.lora import LoraConfig
from a2tgpo.config.run import RunConfig
from a2tgpo.environment.tool import Toolset, build_tools
from a2tgpo.io.errors import ConfigError
from a2tgpo.memory.phases import MemoryPhases
from a2tgpo.model.build import build_policy
from a2tgpo.model.hf_config import load_hf_config
from a2tgpo.model.inference_layout import UNDIVIDED, inference_config
from a2tgpo.model.policy import Policy
from a2tgpo.model.rope import check_positions
from a2tgpo.parallel.engine_group import EngineGroup, build_engine_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.protocol.protocol import AgentProtocol
from a2tgpo.refit.sync import sync_engine
from a2tgpo.rollout.group_rollout import Finished, GroupRollout
from a2tgpo.rollout.vllm_engine import VllmEngine
from a2tgpo.trajectory import Prompt


@dataclass(frozen=True, kw_only=True)
class Player:
    """The objects with which one rank plays the policy."""

    config: RunConfig
    """The configuration. Its `model.path` is the folder from which the architecture and the tokenizer come."""
    engine_group: EngineGroup
    tokenizer: PreTrainedTokenizerBase
    protocol: AgentProtocol
    engine: VllmEngine
    toolset: Toolset
    rollout: GroupRollout

    def play(self, prompts: Sequence[Prompt], *, greedy: bool) -> list[Finished]:
        """Play each prompt once, and return the results in order. All ranks of the engine must call this."""
        playing = self.rollout.play(
            prompts, seed=self.config.run.seed, version=0, greedy=greedy, group_size=1, score_gain=False
        )
        finished = {id(done.prompt): done for done in self.rollout.finished(playing)}
        return [finished[id(prompt)] for prompt in prompts]

    def close(self) -> None:
        """Stop the tools and the engine. The process group continues to exist."""
        self.rollout.close()
        self.toolset.close()
        self.engine.close()


def load_saved(
    file: str | Path, overrides: Sequence[str], path: str | Path, *, key: str = "--checkpoint"
) -> tuple[RunConfig, SavedModel]:
    """Return a run's configuration with a layout for this program's processes, and the run's saved weights.

    Args:
        file: the YAML file of the run. Its layout is ignored (`inference_config`).
        overrides: overrides as in `load_config`. They may set the layout.
        path: the path of the weights, as `find_model` accepts it.
        key: the option with which the user gave `path`, for error messages.

    Raises:
        ConfigError: if `load_config`, `find_model` or `inference_config` raises it.
    """
    config = load_config(file, [*UNDIVIDED, *overrides])
    model = find_model(path, untrained=config.model.path, key=key)
    hf_config = load_hf_config(str(model.path) if model.is_hf else config.model.path)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    explicit = overridden_keys(overrides)
    return inference_config(config, hf_config, world_size=world_size, explicit=explicit), model


def open_player(config: RunConfig, groups: ParallelGroups, model: SavedModel) -> Player:
    """Build a player whose engine has the weights of `model`; every rank must call this.

    The weights of a checkpoint reach the engine through the trainer's model, as in training. A probe then
    compares the engine's log-probs of fixed tokens with the trainer's.

    Raises:
        ConfigError: with a one-line message, if the engine cannot play with these weights or settings.
    """
    if model.is_hf:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(model.path)))
    engine_group = build_engine_group(config, groups)
    check_positions(config.model.path, load_hf_config(config.model.path), config.max_model_len)
    toolset = build_tools(config)
    protocol = build_run_protocol(config, groups, toolset)
    if model.is_hf:
        engine = build_engine(config, engine_group, tokenizer=protocol.tokenizer)
    else:
        policy = load_policy(config, groups, model)
        phases = MemoryPhases(policy)
        engine = phases.build_engine(
            functools.partial(
                build_engine, config, engine_group, tokenizer=protocol.tokenizer, with_weights=False
            )
        )
        sync_engine(policy, engine, phases, config, version=model.step)
    return Player(
        config=config,
        engine_group=engine_group,
        tokenizer=protocol.tokenizer,
        protocol=protocol,
        engine=engine,
        toolset=toolset,
        rollout=build_rollout(config, engine_group, engine=engine, toolset=toolset, protocol=protocol),
    )


def load_policy(config: RunConfig, groups: ParallelGroups, model: SavedModel) -> Policy:
    """Build the trainer's model with the weights of `model`, and freeze the weights; every rank must call this."""
    if model.is_hf:
        hf = dataclasses.replace(config.model, path=str(model.path), lora=LoraConfig())
        return build_policy(hf, config.parallel, groups, update=None, trainable=False)
    policy = build_policy(
        config.model, config.parallel, groups, update=None, trainable=False, with_weights=False
    )
    try:
        checkpoint.load_weights(model.path, policy)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return policy
