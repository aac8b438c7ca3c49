"""Which ranks are at fault, according to the facts of all ranks."""

from pathlib import Path

from a2tgpo.config.load import load_config
from a2tgpo.launch import needs
from a2tgpo.launch.host_memory import memory_left
from a2tgpo.launch.rank_facts import RankFacts, compare, host_memory_faults, path_fingerprint
from a2tgpo.plan.hardware import GIB
from a2tgpo.plan.host_memory import HostMemory

PATHS = {"model.path": "/models/m"}


def told(rank: int, *, gpu: str = "", torch: str = "2.13.0", model: str = "abc", **others) -> RankFacts:
    return RankFacts(rank=rank, equal={"torch": torch}, paths={"model.path": model}, gpu=gpu, **others)


def test_the_odd_one_is_to_blame_also_where_it_is_rank_0():
    assert compare([told(0, torch="2.12.0"), told(1), told(2)], PATHS) == {
        0: ["torch is 2.12.0, but 2.13.0 on most ranks"]
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
    assert causes == {2: ["has the same GPU as rank 0; start one rank per GPU"]}


def test_a_clock_that_is_behind_is_told_and_a_small_difference_is_not():
    causes = compare([told(0), told(1, clock_ahead_s=-7.0), told(2, clock_ahead_s=1.0)], PATHS)
    assert causes == {1: ["its clock is 7 s behind rank 0's; synchronise it (NTP)"]}


def test_a_fingerprint_sees_names_sizes_and_ends_and_not_where_the_folder_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "x.bin").write_bytes(b"x" * 100_000)
    assert path_fingerprint(str(tmp_path / "a")) == path_fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "part" / "x.bin").write_bytes(b"x" * 99_999 + b"y")
    assert path_fingerprint(str(tmp_path / "a")) != path_fingerprint(str(tmp_path / "b"))
    assert path_fingerprint(str(tmp_path / "c")) == "cannot be read (No such file or directory)"


def test_the_checkpoints_to_come_count_the_new_one_and_the_weights_that_stay(tmp_path):
    def to_come(**settings: object) -> tuple[int, int]:
        overrides = [f"run.root={tmp_path}", *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())]
        kept = needs.checkpoints_to_come(load_config("configs/quickstart.yaml", overrides))
        return kept.whole, kept.weights_only

    settings = {
        "run__steps": 100,
        "evaluation__every": 50,
        "checkpoint__every": 10,
        "checkpoint__keep": 2,
        "checkpoint__best_by": "em",
    }
    assert to_come(**settings) == (3, 1)
    assert to_come(**settings | {"checkpoint__best_by": "none"}) == (3, 0)
    assert to_come(**settings | {"run__steps": 20}) == (2, 0)
    assert to_come(**settings | {"checkpoint__every": 0, "evaluation__every": 0}) == (1, 0)
    assert to_come(**settings | {"checkpoint__keep_every": 20}) == (3, 1 + 4), "100 is among the newest"
    for step in (10, 20, 30):
        folder = tmp_path / "quickstart" / "checkpoints" / f"step_{step}"
        (folder / ("rng" if step > 10 else "sharded")).mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
    assert to_come(**settings | {"checkpoint__keep_every": 20}) == (1, 4)


def machine(root: Path, *, available_kb: int, cgroup: str, **files: str) -> Path:
    """Write the files of a machine below `root`, with `files` in /sys/fs/cgroup. In the names of files, __
    means /.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def test_memory_is_left_as_the_machine_or_the_tightest_control_group_says(tmp_path):
    roomy = machine(
        tmp_path / "a",
        available_kb=3,
        cgroup="0::/job/step\n",
        job__memory_dot_max="max",
        job__memory_dot_current="0",
    )
    assert memory_left(roomy) == (3 * 1024, "MemAvailable")
    tight = machine(
        tmp_path / "b",
        available_kb=3,
        cgroup="0::/job/step\n",
        job__memory_dot_max="2000",
        job__memory_dot_current="900",
        job__memory_dot_stat="anon 600\ninactive_file 300\n",
    )
    assert memory_left(tight) == (2000 - 900 + 300, "memory.max of its control group")
    old = machine(
        tmp_path / "c",
        available_kb=3,
        cgroup="5:cpu:/x\n4:memory:/slurm/job\n0::/\n",
        memory__slurm__memory_dot_limit_in_bytes="1500",
        memory__slurm__memory_dot_usage_in_bytes="1000",
        memory__slurm__memory_dot_stat="total_inactive_file 0\n",
    )
    assert memory_left(old) == (500, "memory.limit_in_bytes of its control group")


def test_a_machine_without_room_for_all_its_ranks_is_told_with_what_helps():
    config = load_config("configs/train_8b.yaml", ["cluster.plan_margin=0.1"])
    rank = HostMemory(offloaded=10 * GIB, saving=5 * GIB, loading=GIB, processes=4 * GIB)

    def faults(*left_gib: float, config=config) -> tuple[dict[int, list[str]], list[str]]:
        hosts = ("n1", "n1", "n2", "n2")
        found = [
            told(number, host=host, memory_left=(int(left * GIB), "MemAvailable"))
            for number, (host, left) in enumerate(zip(hosts, left_gib, strict=True))
        ]
        return host_memory_faults(found, [rank] * 4, config), found[2].warnings

    def line(left_gib: int) -> str:
        return (
            "38 GiB of a node's memory are needed (20 for what leaves the cards, 10 for a checkpoint being written, "
            f"8 for processes), {left_gib} GiB are free (MemAvailable); give the job the whole node's memory "
            "(Slurm: --mem=0), set update.offload=false, raise parallel.tensor, or use more nodes"
        )

    assert faults(38, 38, 38, 38) == ({}, [])
    assert faults(38, 38, 40, 37) == ({}, [line(37)]), "within cluster.plan_margin"
    assert faults(38, 38, 40, 34) == ({2: [f"{line(34)}; cluster.plan_margin=0 starts all the same"]}, [])
    warned_only = load_config("configs/train_8b.yaml", ["cluster.plan_margin=0"])
    assert faults(38, 38, 40, 1, config=warned_only) == ({}, [line(1)])
