"""Serve an exported agent as an OpenAI-compatible endpoint; the server calls the agent's tools.

    python tools/serve.py --model FOLDER [--host 127.0.0.1] [--port 8100] [--queue 256] [OVERRIDE ...]
    launch/local.sh -n RANKS --script tools/serve.py FOLDER/agent.json --model FOLDER [...]

`tools/convert.py megatron-to-hf` writes FOLDER, including agent.json, the settings for playing the agent. POST
/v1/chat/completions takes one user message and returns the agent's answer, which is the content of its \\boxed{}. The
field `agent` of the response has turns, calls and results. With the default --host, only this machine can connect. If
--token-file is given, clients must send the bearer token in that file. The ranks divide the model among themselves.
If there are several engines, they divide the questions. On SIGTERM, the server finishes the questions that are being
played, and exits.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from a2tgpo.config.expand import escape, path_argument, text_argument
from a2tgpo.io.errors import ConfigError, require
from a2tgpo.io.program import add_overrides, program_parser
from a2tgpo.launch.preflight import meet_ranks
from a2tgpo.launch.rendezvous import join_launcher
from a2tgpo.lifecycle.failure import report_failure
from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage

if TYPE_CHECKING:
    from socket import socket

    from a2tgpo.serve.inbox import Inbox, Order, Played
    from a2tgpo.serve.player import Player

LOOK_S = 0.5
"""Longest wait for a request, in seconds. After each wait, the server checks whether it should end."""
KEEP_ALIVE_S = 60.0
"""Longest time between two messages from rank 0, in seconds. The other ranks wait up to parallel.timeout_s for a
message."""
GRACE_S = 30.0
"""After a signal, the server waits at most this many seconds for answers to reach their clients."""


def main() -> int:
    args = parse_arguments()
    try:
        join_launcher()
        require(args.queue >= 1, "--queue", args.queue, ">= 1")
        require(0 <= args.port < 2**16, "--port", args.port, "0 to 65535")
        serve(args)
    except (ConfigError, RuntimeError, OSError) as error:
        return report_failure(error)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = program_parser(__doc__)
    parser.add_argument("--model", type=path_argument, required=True, help="exported folder")
    parser.add_argument(
        "--config", help="agent file; default: agent.json in the folder, if it names no code and no secrets"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses")
    parser.add_argument("--port", type=int, default=8100, help="0: any free one (printed)")
    parser.add_argument("--queue", type=int, default=256, help="questions that may wait; more are refused")
    parser.add_argument(
        "--token-file", type=text_argument, default="", help="file with a bearer token that clients must send"
    )
    add_overrides(parser)
    return parser.parse_intermixed_args()


def serve(args: argparse.Namespace) -> None:
    """Answer requests until SIGTERM or Ctrl-C. Every rank must call this. Rank 0 listens."""
    with lasting_objects():
        from a2tgpo.config.load import overridden_keys
        from a2tgpo.parallel.initialize import shutdown
        from a2tgpo.search.bound_socket import bind
        from a2tgpo.serve.agent_file import AGENT_FILE, require_harmless
        from a2tgpo.serve.player import load_saved, open_player

    file = args.config or args.model / AGENT_FILE
    # Report a failed search to the client instead of making it wait for the search server.
    given = [f"model.path={escape(str(args.model))}", "tools.on_outage=continue", *args.overrides]
    config, model = load_saved(file, given, args.model, key="--model")
    if args.config is None:
        require_harmless(file, config, overridden=overridden_keys(args.overrides))
    require(model.is_hf, "--model", str(args.model), "a folder written by tools/convert.py megatron-to-hf")
    groups = meet_ranks(config)
    is_first = groups.rank == 0
    bound = bind(args.host, args.port) if is_first else None
    player = open_player(config, groups, model)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if bound is not None:
        lead(player, bound, args, stopping)
    else:
        while (orders := exchange(None)) is not None:
            play(player, orders)
    player.close()
    shutdown()
    leave_garbage()


def lead(player: Player, bound: socket, args: argparse.Namespace, stopping: threading.Event) -> None:
    """Run the HTTP server in a thread, and play its requests with all ranks. Only rank 0 calls this."""
    import uvicorn

    from a2tgpo.data.tokenizer import load_tokenizer
    from a2tgpo.net.token import read_token
    from a2tgpo.protocol.build import build_protocol
    from a2tgpo.serve.chat_api import build_app
    from a2tgpo.serve.inbox import Inbox

    config, inbox = player.config, Inbox(max_waiting=args.queue)
    protocol = build_protocol(
        config,
        load_tokenizer(config.model.path),  # a second tokenizer, because another thread uses the player's
        schemas=player.toolset.schemas,
        date=player.protocol.template.date,
    )
    app = build_app(
        inbox,
        protocol,
        name=config.run.name,
        temperature=config.rollout.temperature,
        max_prompt_tokens=config.data.max_prompt_tokens,
        token=read_token(args.token_file, key="--token-file", variable="") if args.token_file else None,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(GRACE_S)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    bound.listen(args.queue)
    thread.start()
    host, port = bound.getsockname()[:2]
    print(f"{config.run.name}: listening on http://{host}:{port}/v1", flush=True)
    try:
        answer_all(player, inbox, stopping)
    finally:
        inbox.close()
        server.should_exit = True
        thread.join(GRACE_S)
    exchange(None)  # ends the other ranks


def answer_all(player: Player, inbox: Inbox, stopping: threading.Event) -> None:
    """Answer batches of requests from the inbox until `stopping` is set.

    If playing fails, the requests of the batch get an InboxClosedError, and the original error is raised.
    """
    from a2tgpo.serve.inbox import InboxClosedError

    most = player.config.rollout.max_concurrent * player.engine_group.count
    last_sent = time.monotonic()
    while not stopping.is_set():
        batch = inbox.take(most, timeout_s=LOOK_S)
        if not batch and time.monotonic() < last_sent + KEEP_ALIVE_S:
            continue
        last_sent = time.monotonic()
        try:
            played = play(player, exchange([waiting.order for waiting in batch]) or [])
        except BaseException:
            for waiting in batch:
                waiting.answer.set_exception(InboxClosedError())
            raise
        for waiting, found in zip(batch, played, strict=True):
            waiting.answer.set_result(found)


def exchange(orders: list[Order] | None) -> list[Order] | None:
    """Return rank 0's `orders` on all ranks. None means that the server ends. Every rank must call this."""
    from a2tgpo.parallel.collectives import broadcast_object, world_group

    found: list[Order] | None = broadcast_object(orders, world_group(), source=0)
    return found


def play(player: Player, orders: list[Order]) -> list[Played]:
    """Play `orders`, which are all greedy or all sampled, and return their results. Every rank must call this."""
    from a2tgpo.parallel.collectives import all_gather_object, world_group
    from a2tgpo.serve.inbox import Played

    engines = player.engine_group
    mine: list[Played] = []
    if share := engines.share(orders):
        played = player.play([order.prompt for order in share], greedy=share[0].is_greedy)
        mine = [Played(trajectory=done.trajectory, texts=tuple(done.turn_texts)) for done in played]
    parts = [
        part for part, is_leader in all_gather_object((mine, engines.is_leader), world_group()) if is_leader
    ]
    return [parts[index % engines.count][index // engines.count] for index in range(len(orders))]


if __name__ == "__main__":
    sys.exit(main())
