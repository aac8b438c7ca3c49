"""Ask a trained agent questions in the terminal, and see every turn, tool call and result.

    python tools/chat.py --config CONFIG --checkpoint PATH [--question TEXT] [--sample] [OVERRIDE ...]

PATH is a run's checkpoint (runs/NAME/checkpoints/step_N, or .../best) or a Hugging Face folder. CONFIG is the run's
configuration. The agent does not remember earlier questions. An empty line or the end of the input ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from typing import TYPE_CHECKING

from a2tgpo.io.errors import ConfigError
from a2tgpo.io.program import add_overrides
from a2tgpo.io.terminal import Painter, indented, painter_for
from a2tgpo.launch.arguments import saved_model_parser
from a2tgpo.launch.preflight import meet_ranks
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage

if TYPE_CHECKING:
    from a2tgpo.rollout.group_rollout import Finished
    from a2tgpo.serve.player import Player


def main() -> int:
    args = parse_arguments()
    try:
        join_launcher()
        chat(args)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = saved_model_parser(__doc__)
    parser.add_argument("--question", help="answer this question and exit")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="sample at rollout.temperature instead of taking the most probable token",
    )
    add_overrides(parser)
    return parser.parse_intermixed_args()


def chat(args: argparse.Namespace) -> None:
    """Answer questions until the user ends the program. Every rank must call this. Rank 0 reads and prints."""
    with lasting_objects():
        from a2tgpo.parallel.collectives import broadcast_object, world_group
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.serve.player import load_saved, open_player

    config, model = load_saved(args.config, args.overrides, args.checkpoint)
    groups = meet_ranks(config)
    player = open_player(config, groups, model)
    paint = painter_for(sys.stdout)
    for number in itertools.count():
        entered = read_question(args.question, number) if groups.rank == 0 else ""
        question = broadcast_object(entered, world_group(), source=0)
        if not question:
            break
        try:
            text = ask(player, question, number=number, sample=args.sample, paint=paint)
        except ConfigError as error:
            if args.question:
                raise
            text = f"error: {error}"
        if groups.rank == 0:
            print(text, flush=True)
    player.close()
    shutdown()
    leave_garbage()


def read_question(given: str | None, number: int) -> str:
    """Return question `number` (from 0), or "" after the last. The only question is `given`. If it is None, every
    input line is a question."""
    if given is not None:
        return whole(given).strip() if number == 0 else ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        return whole(input("question> ")).strip()
    return ""


def whole(text: str) -> str:
    """Return `text` with invalid UTF-8 replaced by "?", because no tokenizer accepts invalid UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def ask(player: Player, question: str, *, number: int, sample: bool, paint: Painter) -> str:
    """Play one trajectory on `question`, and return it as text.

    Raises:
        ConfigError: if the question is too long.
    """
    from a2tgpo.trajectory import Prompt

    prompt = Prompt(
        index=0,
        id=f"chat-{number}",
        question=question,
        answers=(),
        tokens=player.protocol.template.render(question),
    )
    (done,) = player.play([prompt], greedy=not sample)
    return render(player, done, paint)


def render(player: Player, done: Finished, paint: Painter) -> str:
    """Return the text to print: every turn with its tool call and the result, then the answer."""
    trajectory, texts = done.trajectory, done.turn_texts
    lines = []
    for index, (turn, text) in enumerate(zip(trajectory.turns, texts, strict=True), start=1):
        lines += [paint(f"turn {index}", "yellow"), paint.tags(indented(text))]
        for call in turn.calls:
            wrong = paint(f" {call.problem or 'failed'}", "red") if call.problem or call.failed else ""
            lines.append(paint(f"  {call.tool} {call.arguments!r}", "yellow") + wrong)
        if turn.is_process:
            lines.append(
                paint(indented(str(player.tokenizer.decode(turn.observation_tokens.tolist()))), "dim")
            )
    answer = player.protocol.format.answer_of(trajectory, texts)
    if answer is None:
        lines.append(paint(f"no answer (stopped: {trajectory.stop_reason})", "red"))
    else:
        lines.append(paint(f"answer: {answer.strip()}", "bold"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
