import resource

from a2tgpo.launch.open_files import limit_fault, raise_limit


def test_the_soft_limit_is_raised_to_the_hard_one():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hard_limit_that_the_ranks_cannot_live_with_is_one_line(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert limit_fault(2) is None and limit_fault(512) is None
    fault = limit_fault(1024)
    assert fault is not None and "\n" not in fault
    assert "may have 4096 open files, but 1024 ranks need up to 5632" in fault
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert limit_fault(100_000) is None
