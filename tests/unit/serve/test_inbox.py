"""The queue between the threads that receive questions and the thread that plays them."""

import threading

import pytest

from a2tgpo.serve.inbox import Inbox, InboxClosedError, InboxFullError, Order
from a2tgpo.trajectory import Prompt


def order(name, *, is_greedy=True):
    return Order(
        prompt=Prompt(index=0, id=name, question="who?", answers=(), tokens=(1,)), is_greedy=is_greedy
    )


def names(batch):
    return [waiting.order.prompt.id for waiting in batch]


def test_what_waits_is_taken_in_order_and_no_more_than_may_be_played():
    inbox = Inbox(max_waiting=9)
    for name in "abc":
        inbox.put(order(name))
    assert names(inbox.take(2, timeout_s=0)) == ["a", "b"]
    assert names(inbox.take(2, timeout_s=0)) == ["c"]
    assert inbox.take(2, timeout_s=0) == []


def test_greedy_and_drawn_questions_are_not_taken_together():
    inbox = Inbox(max_waiting=9)
    for name, is_greedy in (("a", True), ("b", False), ("c", True)):
        inbox.put(order(name, is_greedy=is_greedy))
    assert names(inbox.take(9, timeout_s=0)) == ["a", "c"]
    assert names(inbox.take(9, timeout_s=0)) == ["b"]


def test_one_too_many_is_refused_until_there_is_room():
    inbox = Inbox(max_waiting=1)
    inbox.put(order("a"))
    with pytest.raises(InboxFullError):
        inbox.put(order("b"))
    inbox.take(1, timeout_s=0)
    inbox.put(order("b"))
    assert len(inbox) == 1


def test_a_question_whose_client_has_gone_is_not_played():
    inbox = Inbox(max_waiting=9)
    inbox.put(order("a")).cancel()
    inbox.put(order("b"))
    assert names(inbox.take(9, timeout_s=0)) == ["b"]


def test_a_question_wakes_who_waits_for_one():
    inbox = Inbox(max_waiting=9)
    timer = threading.Timer(0.05, lambda: inbox.put(order("a")))
    timer.start()
    assert names(inbox.take(1, timeout_s=60)) == ["a"]


def test_closing_refuses_what_waits_and_what_comes():
    inbox = Inbox(max_waiting=9)
    waiting = inbox.put(order("a"))
    inbox.close()
    assert isinstance(waiting.exception(timeout=0), InboxClosedError)
    with pytest.raises(InboxClosedError):
        inbox.put(order("b"))
    assert inbox.take(1, timeout_s=60) == []
