"""According to the plan, every training job that docs/slurm.md submits fits its nodes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import a2tgpo.parallel  # noqa: F401  Megatron is adapted to the machine before the plan imports it
from a2tgpo.config.load import load_config
from a2tgpo.io.errors import ConfigError
from a2tgpo.plan.advice import faults
from a2tgpo.plan.dimensions import KNOWN_MODELS
from a2tgpo.plan.hardware import GPUS
from a2tgpo.plan.plan import make_plan

ROOT = Path(__file__).parents[3]
MODELS = {
    "train_70b": "qwen2.5-72b",
    "train_30b_a3b": "qwen3-30b-a3b",
    "train_8b": "qwen3-8b",
    "train_4b": "qwen3-4b",
}
JOBS = [
    line.split("#")[0].strip()
    for line in (ROOT / "docs/slurm.md").read_text().splitlines()
    if re.match(r"(DRY_RUN=1 )?sbatch .*slurm/train_", line)
]


@pytest.mark.parametrize("job", JOBS)
def test_a_documented_training_job_fits_its_nodes_by_the_plan(job):
    words = shlex.split(job)
    words = words[words.index("sbatch") + 1 :]
    at = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
    options, script, arguments = words[:at], ROOT / words[at], words[at + 1 :]
    name = script.stem
    nodes = re.search(r"^#SBATCH --nodes=(\d+)", script.read_text(), re.MULTILINE)
    num_nodes = int(options[options.index("--nodes") + 1]) if "--nodes" in options else int(nodes[1])
    overrides = [str(ROOT / word) if word.endswith(".yaml") else word for word in arguments]
    files = [word for word in overrides if word.endswith(".yaml")]
    config = files.pop(0) if files and "=" not in overrides[0] else str(ROOT / f"configs/{name}.yaml")
    rest = [word for word in overrides if word != config]
    plan = make_plan(
        load_config(config, rest), KNOWN_MODELS[MODELS[name]], GPUS["h100-80gb"], gpus=8 * num_nodes
    )
    assert plan.fits, faults(plan)


def test_the_page_has_jobs_on_other_numbers_of_nodes_than_the_scripts():
    assert len(JOBS) >= 4 and any("--nodes" in job for job in JOBS)


@pytest.mark.parametrize("name", MODELS)
def test_a_cluster_preset_reads_the_address_where_the_retrieval_job_writes_it(name):
    search = load_config(ROOT / f"configs/{name}.yaml").search
    written = re.search(r"--url-file (\S+)", (ROOT / "slurm/retrieval.sh").read_text().split("set -euo")[1])[
        1
    ]
    assert (search.backend, search.url_file, search.url) == ("http", written, "")


def test_an_address_replaces_the_file_that_holds_one_and_is_refused_beside_it():
    address = "search.url=http://127.0.0.1:8000/retrieve"
    with pytest.raises(
        ConfigError, match=r"search.url is 'http.*; allowed: empty with search.url_file \(runs/"
    ):
        load_config(ROOT / "configs/train_8b.yaml", [address])
    assert load_config(ROOT / "configs/train_8b.yaml", [address, "search.url_file="]).search.url_file == ""
