"""Which objects Python's garbage collector examines."""

import gc
import weakref

import pytest

from a2tgpo.lifecycle.garbage import lasting_objects, leave_garbage


class Cycle:
    def __init__(self):
        self.own = self


def test_no_garbage_is_collected_inside_and_its_objects_are_not_examined_later():
    with lasting_objects():
        assert not gc.isenabled()
        kept = Cycle()
    assert gc.isenabled()
    assert not any(kept is found for found in gc.get_objects())


def test_garbage_that_arises_later_is_collected():
    with lasting_objects():
        pass
    later = weakref.ref(Cycle())
    gc.collect()
    assert later() is None


def test_an_error_inside_leaves_the_collector_on():
    with pytest.raises(ImportError), lasting_objects():
        raise ImportError
    assert gc.isenabled()


def test_nothing_is_searched_for_garbage_while_a_program_ends():
    kept = Cycle()
    leave_garbage()
    try:
        assert not gc.isenabled()
        assert not any(kept is found for found in gc.get_objects())
    finally:
        gc.enable()
