"""Which ranks are to blame, by what all of them have told."""

from a2tgpo.config.load import load_config
from launch import preflight
from launch.rank_facts import RankFacts, compare, fingerprint

PATHS = {"model.path": "/models/m"}


def told(rank: int, *, gpu: str = "", torch: str = "2.13.0", model: str = "abc", **others) -> RankFacts:
    return RankFacts(rank=rank, equal={"torch": torch}, paths={"model.path": model}, gpu=gpu, **others)


def test_the_odd_one_is_to_blame_also_where_it_is_rank_0():
    assert compare([told(0, torch="2.12.0"), told(1), told(2)], PATHS) == {
        0: ["torch is 2.12.0, on most ranks 2.13.0"]
    }


def test_of_two_that_differ_rank_0_is_right():
    assert compare([told(0), told(1, torch="2.12.0")], PATHS).keys() == {1}


def test_one_rank_that_can_read_a_path_is_right_and_none_is_the_configurations_fault():
    lost = "cannot be read (No such file or directory)"
    assert compare([told(0), told(1, model=lost), told(2, model=lost)], PATHS) == {
        rank: [f"model.path: /models/m {lost}"] for rank in (1, 2)
    }
    assert compare([told(0, model=lost), told(1, model=lost)], PATHS) == {}


def test_two_ranks_with_one_gpu_are_told():
    causes = compare([told(0, gpu="GPU-a"), told(1, gpu="GPU-b"), told(2, gpu="GPU-a")], PATHS)
    assert causes == {2: ["has the same GPU as rank 0: one rank a GPU"]}


def test_a_clock_that_is_behind_is_told_and_a_small_difference_is_not():
    causes = compare([told(0), told(1, clock_ahead_s=-7.0), told(2, clock_ahead_s=1.0)], PATHS)
    assert causes == {1: ["its clock is 7 s behind rank 0's: set it (NTP)"]}


def test_a_fingerprint_sees_names_sizes_and_ends_and_not_where_the_folder_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "x.bin").write_bytes(b"x" * 100_000)
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "part" / "x.bin").write_bytes(b"x" * 99_999 + b"y")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))
    assert fingerprint(str(tmp_path / "c")) == "cannot be read (No such file or directory)"


def test_the_checkpoints_to_come_are_counted_with_the_best_and_the_new_one(tmp_path, monkeypatch):
    def copies(**settings: object) -> int:
        overrides = [f"run.root={tmp_path}", *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())]
        return preflight.copies_to_come(load_config("configs/quickstart.yaml", overrides))

    settings = {
        "run__steps": 100,
        "checkpoint__every": 10,
        "checkpoint__keep": 2,
        "checkpoint__best_by": "em",
    }
    assert copies(**settings) == 4
    assert copies(**settings | {"checkpoint__best_by": "none"}) == 3
    assert copies(**settings | {"run__steps": 20}) == 2
    assert copies(**settings | {"checkpoint__every": 0}) == 1
    for step in (10, 20):
        folder = tmp_path / "quickstart" / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
    assert copies(**settings) == 2
