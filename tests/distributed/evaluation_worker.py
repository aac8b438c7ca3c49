"""Run tools/evaluate.py with a scripted engine.

The engine writes each question that it gets to the file ASKED. If GATE is set, the engine gives no answer until the
file GATE exists.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import evaluate
from played import tags
from scripted_engine import ScriptedEngine
from scripted_search import ScriptedSearch, toolset_of
from transformers import AutoTokenizer

from a2tgpo.config.run import RunConfig
from a2tgpo.parallel.engine_group import build_engine_group
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.rollout.group_rollout import GroupRollout
from a2tgpo.serve import player


def answer(context: str) -> str:
    with open(os.environ["ASKED"], "a") as stream:
        print(re.findall(r"question \d", context)[-1], file=stream)
    return "<think> I know. </think> <answer> \\boxed{Rome} </answer>"


class SlowEngine(ScriptedEngine):
    """Answers only when the file GATE exists."""

    def step(self) -> list[Any]:
        while "GATE" in os.environ and not Path(os.environ["GATE"]).exists():
            time.sleep(0.02)
        return super().step()

    def close(self) -> None:
        pass


def open_player(config: RunConfig, groups: ParallelGroups, _model: Any) -> player.Player:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    engine, toolset, protocol = SlowEngine(tokenizer, answer), toolset_of(ScriptedSearch()), tags(tokenizer)
    engine_group = build_engine_group(config, groups)
    return player.Player(
        config=config,
        engine_group=engine_group,
        tokenizer=tokenizer,
        protocol=protocol,
        engine=engine,
        toolset=toolset,
        rollout=GroupRollout(engine, toolset, protocol, rollout=config.rollout, engine_group=engine_group),
    )


if __name__ == "__main__":
    player.open_player = open_player
    sys.exit(evaluate.main())
