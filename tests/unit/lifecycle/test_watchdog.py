"""The watchdog's clock without a thread or a process group. The test sets the time."""

import threading
import time

import pytest
import torch.distributed as dist

from a2tgpo.config.watchdog import WatchdogConfig
from a2tgpo.lifecycle import watchdog
from a2tgpo.lifecycle.outage import Outage


class Ended(Exception):
    """Raised instead of ending the process."""


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def open_watchdog(monkeypatch, tmp_path, clock):
    store = dist.HashStore()
    opened = []
    monkeypatch.setattr(watchdog, "side_store", lambda name, timeout_s: store)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "join", lambda self: None)

    def end(self, verdict):
        raise Ended(verdict)

    monkeypatch.setattr(watchdog.Watchdog, "_end", end)

    def open_watchdog(rank, outage=None):
        made = watchdog.Watchdog(
            WatchdogConfig(rollout_s=300.0, other_s=100.0), tmp_path, rank=rank, world_size=2, outage=outage
        )
        opened.append(made)
        return made

    yield open_watchdog
    for made in opened:
        made.close()


def test_the_clock_of_all_ranks_stands_still_while_one_waits_for_a_service(open_watchdog, clock):
    outage = Outage(limit_s=1800.0, clock=time.monotonic)
    waits, done = open_watchdog(0, outage), open_watchdog(1)
    waits.enter("rollout")
    done.enter("exchange")
    clock[0] += 50
    waits._look(), done._look()
    outage.begin("search", "down")
    for _ in range(1000):
        clock[0] += 1
        waits._look(), done._look()
    outage.end()
    clock[0] += 48
    waits._look(), done._look()
    clock[0] += 3
    with pytest.raises(Ended, match=r"exchange has taken 101 s on rank 1 \(watchdog.other_s=100\)"):
        done._look()


def test_a_stage_may_take_ten_times_its_longest_so_far_within_its_limit(open_watchdog, clock):
    alone = open_watchdog(0)
    alone._config = WatchdogConfig()
    limit_s = lambda stage: alone._deadline(stage)[1]  # noqa: E731
    assert [limit_s("rollout"), limit_s("exchange"), limit_s("assemble")] == [7200, 2400, 3600]
    for stage, seconds in (("rollout", 50), ("exchange", 2), ("update", 10), ("checkpoint", 1)):
        alone.enter(stage)
        clock[0] += seconds
    alone.enter("")
    assert limit_s("rollout") == 500, "10 x 50 s"
    assert limit_s("update") == 300, "never less than min_s"
    assert limit_s("exchange") == 500, "other ranks' rollouts are waited for"
    assert limit_s("checkpoint") == 2400, "the save before is waited for"
    alone.enter("rollout")
    clock[0] += 501
    with pytest.raises(Ended, match=r"rollout has taken 501 s.*500 s by watchdog.slack.*longest so far 50 s"):
        alone._look()
    alone.enter("rollout")
    clock[0] += 900
    alone.enter("")
    assert limit_s("rollout") == 7200, "the field stays the most"


def test_a_start_that_hangs_is_ended(open_watchdog, clock):
    alone = open_watchdog(0)
    alone.enter("assemble")
    clock[0] += 3601
    with pytest.raises(Ended, match=r"assemble has taken 3601 s on rank 0 \(watchdog.startup_s=3600\)"):
        alone._look()


def test_a_stage_without_an_outage_ends_at_its_deadline(open_watchdog, clock):
    alone = open_watchdog(0, Outage(limit_s=1800.0))
    alone.enter("exchange")
    clock[0] += 99
    alone._look()
    clock[0] += 2
    with pytest.raises(Ended, match=r"exchange has taken 101 s on rank 0"):
        alone._look()
