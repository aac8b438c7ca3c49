"""Score a trained policy on question sets: exact match, F1 and pass@k, with and without the format gate.

    python tools/evaluate.py --config CONFIG --checkpoint PATH [--sets NAME=FILE,FILE] [--samples N] [OVERRIDE ...]
    launch/local.sh -n RANKS --script tools/evaluate.py CONFIG --checkpoint PATH [...]

PATH is a run's checkpoint (runs/NAME/checkpoints/step_N, or .../best) or a Hugging Face folder. CONFIG is the run's
configuration, for example runs/NAME/config.yaml. The program writes report.md, report.json, answers.jsonl and
tensorboard/ to --out. Complete answers are saved in OUT.partial/, so the same command resumes an interrupted
evaluation.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from a2tgpo.config.expand import expand, path_argument
from a2tgpo.config.run import RunConfig
from a2tgpo.data.question_mix import set_name
from a2tgpo.data.question_set import Question, load_questions
from a2tgpo.evaluate.sets import load_evaluation_sets
from a2tgpo.io.atomic_file import atomic_folder, is_foreign, write_json, write_text
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.exit_codes import START_AGAIN
from a2tgpo.io.json_lines import write_lines
from a2tgpo.io.program import add_overrides
from a2tgpo.launch.arguments import saved_model_parser
from a2tgpo.launch.preflight import meet_ranks
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage
from a2tgpo.lifecycle.stop_signal import StopSignal
from a2tgpo.run.folder_lock import FolderLock

if TYPE_CHECKING:
    from a2tgpo.checkpoint.find import SavedModel
    from a2tgpo.data.template import PromptSet
    from a2tgpo.evaluate.answer_log import Key
    from a2tgpo.evaluate.evaluate import Answer
    from a2tgpo.lifecycle.stop_request import StopRequest
    from a2tgpo.reward.pool import RewardPool
    from a2tgpo.serve.player import Player

REPORT = "report.json"
"""Name of a file in every report."""
Result = TypeVar("Result")
Answers = dict[str, list["Answer"]]
"""{name of the data set: its answers}."""


def main() -> int:
    args = parse_arguments()
    stop_signal = StopSignal()
    try:
        join_launcher()
        require((args.samples or 0) >= 0, "--samples", args.samples, ">= 0")
        require(args.limit >= 0, "--limit", args.limit, ">= 0")
        if args.out is not None:
            require_replaceable(args.out)
        return evaluate(args, stop_signal)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error, is_ending=bool(stop_signal.name))


def parse_arguments() -> argparse.Namespace:
    parser = saved_model_parser(__doc__)
    parser.add_argument(
        "--sets",
        default="",
        metavar="NAME=FILE,FILE",
        help="question files; a set without a name is named after its folder or file; default: the run's sets",
    )
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions of each set; 0: all")
    parser.add_argument(
        "--samples",
        type=int,
        help="answers sampled per question, in addition to the greedy one; default: evaluation.samples",
    )
    parser.add_argument(
        "--out", type=path_argument, help="folder of the report; default: ROOT/NAME/evaluation/CHECKPOINT"
    )
    add_overrides(parser)
    return parser.parse_intermixed_args()


def load_sets(
    text: str, config: RunConfig, *, limit: int, need_answers: bool = True
) -> dict[str, list[Question]]:
    """Return {name: questions} for the value of --sets.

    Raises:
        ConfigError: if a question file is bad, or if two sets share a name.
    """
    if not text:
        sets = load_evaluation_sets(config, is_whole=True, need_answers=need_answers)
        if not config.evaluation.sets:
            sets = {set_name(Path(config.data.test)): sets["test"]}
        return {name: questions[: limit or None] for name, questions in sets.items()}
    sets = {}
    for part in text.split(","):
        name, equals, file = part.strip().partition("=")
        if not equals:
            name, file = set_name(Path(name)), name
        require(bool(name and file), "--sets", part, "NAME=FILE or FILE, separated by commas")
        require(
            name not in sets, "--sets", part, f"a name other than {name!r}, which is taken; write NAME=FILE"
        )
        sets[name] = load_questions(expand(file, "--sets"), key="--sets", need_answers=need_answers)[
            : limit or None
        ]
    return sets


def require_replaceable(out: Path) -> None:
    """Raise a `ConfigError` of one line if `out` is a file, or a folder that has files but no report."""
    if out.name in ("", "..") or out.is_file() or is_foreign(out, REPORT):
        raise ConfigError(
            f"--out: {out} is no report, and a report would replace it as a whole; give a new folder, for example "
            f"{out / 'report'}"
        )


def evaluate(args: argparse.Namespace, stop_signal: StopSignal) -> int:
    """Play every set and write the report. Return the exit code. Every rank must call this."""
    with lasting_objects():
        import torch.distributed as dist

        from a2tgpo.evaluate.answer_log import open_log
        from a2tgpo.evaluate.evaluation_settings import evaluation_settings
        from a2tgpo.lifecycle.stop_request import StopAgreed, StopRequest
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.reward.load import build_rewards
        from a2tgpo.reward.pool import RewardPool
        from a2tgpo.run.resume import changed_files
        from a2tgpo.serve.player import load_saved, open_player

    config, model = load_saved(args.config, args.overrides, args.checkpoint)
    notes = [] if model.is_hf else changed_files(model.path, config)
    rewards = build_rewards(config)
    sets = load_sets(
        args.sets, config, limit=args.limit, need_answers=any(named.needs_answers for named in rewards)
    )
    num_samples = config.evaluation.samples if args.samples is None else args.samples
    out = args.out or Path(config.run.root) / config.run.name / "evaluation" / model.label
    partial = out.with_name(f"{out.name}.partial")
    settings = evaluation_settings(config, model.identity, sets)
    groups = meet_ranks(config)
    for note in notes if groups.rank == 0 else ():
        print(f"warning: {note}", file=sys.stderr, flush=True)
    locks: list[FolderLock] = []  # only on rank 0
    on_rank_0(lambda: locks.append(claim(partial)))
    known = on_rank_0(lambda: open_log(partial, settings))
    if known:
        stop_signal.kept = f"{len(known)} answers of earlier starts are kept in {partial}"
    player = open_player(config, groups, model)
    prompts = prompt_sets(player, sets)
    pool = RewardPool(rewards, config.reward)
    stop = StopRequest(stop_signal, margin_s=config.checkpoint.margin_s, outage=player.rollout.outage)
    stop_signal.begin_training()
    try:
        greedy, sampled = play(player, prompts, num_samples, pool, known=known, partial=partial, stop=stop)
    except StopAgreed:
        if groups.rank == 0:
            total = sum(map(len, prompts.values())) * (1 + num_samples)
            done = len(open_log(partial, settings))
            print(f"stopped at answer {done} of {total}: {stop.reason}; kept in {partial}", flush=True)
    else:
        if groups.rank == 0:
            report(out, partial, config, model, greedy, sampled, notes, lock=locks[0])
    pool.close()
    player.close()
    # Wait for all ranks, because a launcher ends the other ranks when one rank exits with a code other than 0.
    dist.barrier()
    shutdown()
    leave_garbage()
    return START_AGAIN if stop.is_agreed else 0


def claim(partial: Path) -> FolderLock:
    """Create the folder of the answers, and lock it until the program ends. Only one process may call this.

    If a launcher is killed, its ranks go on. Without the lock, a second start would ask their questions again.

    Raises:
        ConfigError: with a one-line message, if another process holds the folder, or if it cannot be written.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        return FolderLock(partial, key="--out")
    except OSError as error:
        raise ConfigError(f"--out: cannot use {partial} ({error.strerror}); choose another folder") from None


def prompt_sets(player: Player, sets: dict[str, list[Question]]) -> dict[str, PromptSet]:
    """Return {name: the set's questions as prompts}. Raise ConfigError if a prompt is too long."""
    from a2tgpo.data.template import PromptSet

    limit = player.config.data.max_prompt_tokens
    prompts = {
        name: PromptSet(questions, player.protocol.template, max_prompt_tokens=limit)
        for name, questions in sets.items()
    }
    for prompt_set in prompts.values():
        prompt_set.check_lengths()
    return prompts


def on_rank_0(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0. Return its result, or raise its ConfigError, on all ranks. Every rank must call this."""
    from a2tgpo.parallel.collectives import broadcast_object, world_group

    world = world_group()
    found: Any = None
    if world.rank() == 0:
        try:
            found = work()
        except ConfigError as error:
            found = error
    found = broadcast_object(found, world, source=0)
    if isinstance(found, ConfigError):
        raise found
    return found


def play(
    player: Player,
    sets: dict[str, PromptSet],
    num_samples: int,
    rewards: RewardPool,
    *,
    known: dict[Key, Answer],
    partial: Path,
    stop: StopRequest,
) -> tuple[Answers, Answers]:
    """Play all sets, and return the greedy and the sampled answers of all ranks, in the order of the questions.

    Every rank must call this.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    from a2tgpo.evaluate.answer_log import AnswerLog
    from a2tgpo.evaluate.answer_sets import answer_sets

    engine_group = player.engine_group
    total = sum(map(len, sets.values())) * (1 + num_samples)
    log = AnswerLog(partial, engine=engine_group.index) if engine_group.is_leader else None
    found: list[Answers] = []
    with tqdm(
        total=total, initial=min(len(known), total), unit="answer", disable=dist.get_rank() != 0
    ) as bar:
        try:
            for samples in (0, num_samples) if num_samples else (0,):
                found.append(
                    answer_sets(
                        player.rollout,
                        sets,
                        num_samples=samples,
                        seed=player.config.run.seed,
                        engine_group=engine_group,
                        known=known,
                        log=log,
                        rewards=rewards,
                        stop=stop,
                        bar=bar,
                    )
                )
        finally:
            if log is not None:
                log.close()
    return found[0], found[1] if num_samples else {}


def report(
    out: Path,
    partial: Path,
    config: RunConfig,
    model: SavedModel,
    greedy: Answers,
    sampled: Answers,
    notes: Sequence[str],
    *,
    lock: FolderLock,
) -> None:
    """Write the report, and remove the stored answers in `partial` unless some answers must be judged again.

    Args:
        lock: the lock of `partial`. It is released before the folder is removed.
    """
    answers = [answer for sets in (greedy, sampled) for members in sets.values() for answer in members]
    errors = [answer.reward_error for answer in answers if answer.reward_error is not None]
    if not errors:
        write_report(out, config, model, greedy, sampled, notes)
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)
        return
    unjudged = f"{len(errors)} of {len(answers)} answers have no rewards; last cause: {errors[-1]}"
    write_report(out, config, model, greedy, sampled, [*notes, unjudged])
    print(f"{unjudged}. The same command judges them again; {partial} keeps the other answers", flush=True)


def write_report(
    out: Path,
    config: RunConfig,
    model: SavedModel,
    greedy: Answers,
    sampled: Answers,
    further_notes: Sequence[str],
) -> None:
    """Write the report to a new folder that atomically replaces `out`, and print the report's tables."""
    from torch.utils.tensorboard import SummaryWriter

    from a2tgpo.evaluate.answer_log import GREEDY, SAMPLE
    from a2tgpo.evaluate.report import summarize, to_markdown, to_scalars

    summary = summarize(greedy, sampled)
    notes = [f"weights: {model.path}", f"run: {config.run.name}"]
    if sampled:
        notes.append(f"samples drawn at temperature {config.rollout.temperature:g}")
    notes += further_notes
    page = to_markdown(summary, title=f"Evaluation of {config.run.name}, {model.label}", notes=notes)
    record = {"checkpoint": str(model.path), "step": model.step, "run": config.run.name, **summary}
    try:
        with atomic_folder(out) as folder:
            write_text(folder / "report.md", page)
            write_json(folder / REPORT, record)
            write_lines(
                folder / "answers.jsonl", answer_lines(greedy, GREEDY) + answer_lines(sampled, SAMPLE)
            )
            with SummaryWriter(str(folder / "tensorboard")) as board:
                for name, value in to_scalars(summary).items():
                    board.add_scalar(f"evaluation/{name}", value, model.step)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out} ({error.strerror}); choose another folder") from None
    print(page)
    print(f"wrote {out}", flush=True)


def answer_lines(answers: Answers, kind: str) -> list[dict[str, Any]]:
    from a2tgpo.evaluate.answer_log import answer_record

    return [answer_record(name, kind, answer) for name, members in answers.items() for answer in members]


if __name__ == "__main__":
    sys.exit(main())
