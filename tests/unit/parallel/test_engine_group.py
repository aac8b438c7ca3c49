"""How the ranks share the engines."""

from types import SimpleNamespace

import torch.distributed as dist

from a2tgpo.parallel.engine_group import build_engine_group


def test_ranks_of_an_engine_talk_over_the_cpu_and_all_ranks_make_all_groups(monkeypatch):
    made = []

    def new_group(ranks, **options):
        made.append((ranks, options["backend"], options["timeout"].total_seconds()))
        return tuple(ranks)

    monkeypatch.setattr(dist, "new_group", new_group)
    config = SimpleNamespace(
        rollout=SimpleNamespace(tensor_parallel=2), parallel=SimpleNamespace(timeout_s=90.0)
    )
    engines = build_engine_group(config, SimpleNamespace(world_size=4, rank=3))
    assert made == [([0, 1], "gloo", 90.0), ([2, 3], "gloo", 90.0)]
    assert (engines.index, engines.count, engines.is_leader, engines.group) == (1, 2, False, (2, 3))
