"""The rank of this process and the meeting point of the ranks, from the variables of each launcher."""

import importlib
import os
import subprocess
import sys

import pytest

from a2tgpo.io.errors import ConfigError
from a2tgpo.launch import joining, rendezvous
from a2tgpo.launch.rendezvous import first_host, launched

SRUN = {
    "SLURM_JOB_ID": "81214",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "localhost,node[01-04]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


def test_ranks_of_srun_are_named_as_torchrun_names_them_and_meet_at_the_first_node():
    found = launched(SRUN)
    assert found == TORCHRUN | {"MASTER_ADDR": "localhost", "MASTER_PORT": found["MASTER_PORT"]}
    assert 20000 <= int(found["MASTER_PORT"]) < 30000


def test_jobs_and_steps_that_follow_each_other_meet_at_other_ports():
    ports = {
        launched(SRUN | {"SLURM_JOB_ID": str(81214 + job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(20)
        for step in range(20)
    }
    assert len(ports) == 400


def test_an_address_and_a_port_that_are_set_are_kept():
    found = launched(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize(
    "started",
    [
        TORCHRUN | {"RANK": "3", "TORCHELASTIC_RUN_ID": "none"},
        TORCHRUN | {"RANK": "3", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16"},
        TORCHRUN | {"RANK": "3", "PMI_RANK": "3", "PMI_SIZE": "16"},
        TORCHRUN,
    ],
    ids=["torchrun", "Open MPI", "MPICH", "srun itself"],
)
def test_a_launcher_inside_of_srun_is_what_counts(started):
    names = {name: started[name] for name in rendezvous.NAMES}
    assert launched(SRUN | started) == names


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (SRUN, "srun started this process as 9 of 16"),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            r"Open MPI\) started this process as 1 of 2",
        ),
    ],
    ids=["srun", "mpirun"],
)
def test_a_rank_that_another_job_left_in_the_environment_is_one_line(launcher, said):
    left_over = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "8"}
    with pytest.raises(ConfigError, match=f"RANK is 0 and WORLD_SIZE 8 .*{said}: unset RANK WORLD_SIZE"):
        launched(left_over | launcher)


def test_what_another_jobs_torchrun_told_its_ranks_is_forgotten_under_srun(monkeypatch):
    for name in [name for name in os.environ if name in rendezvous.NAMES or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    left_over = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "PET_NNODES": "2",
    }
    for name, value in (SRUN | left_over).items():
        monkeypatch.setenv(name, value)
    for name in rendezvous.NAMES:  # so that the variables set by join_launcher are removed again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    rendezvous.join_launcher()
    assert os.environ["RANK"] == "9" and left_over.keys() & os.environ.keys() == set()


def test_rank_0_tells_soon_that_it_is_not_at_the_address_that_another_job_left(monkeypatch):
    monkeypatch.setattr(joining, "SELF_CONNECT_S", 0.5)
    left_over = {"RANK": "0", "MASTER_ADDR": "another-job.invalid", "MASTER_PORT": "29817"}
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RuntimeError, match=r"another-job\.invalid:29817 .* is not an address of this machine, .* unset both"
    ):
        joining.open_store(300)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_SIZE": "1"},
    ],
    ids=["no launcher", "batch script of sixteen tasks", "step of one task", "mpirun of one process"],
)
def test_a_process_that_is_alone_is_told_so(environment):
    assert launched(environment) is None


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n1", "n1"),
        ("gpu-a7,gpu-b1", "gpu-a7"),
        ("node[007-012,020]", "node007"),
        ("node[3,7-9],login", "node3"),
        ("rack[1-2]node[07-09,12].cluster", "rack1node07.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "node[", "],node", ",n1"])
def test_what_is_no_node_list_is_refused(node_list):
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST is"):
        first_host(node_list)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"),
        (TORCHRUN | {"RANK": "16"}, "RANK is 16; allowed: below WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (
            {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")},
            "SLURM_STEP_NUM_TASKS is set, but not SLURM_LOCALID MASTER_ADDR",
        ),
        (
            SRUN | {"SLURM_STEP_NODELIST": "no-such-host.invalid"},
            "cannot resolve 'no-such-host.invalid'.* export MASTER_ADDR",
        ),
        (SRUN | {"OMPI_COMM_WORLD_SIZE": "2"}, "start launch/mpi.py instead"),
        ({"PMI_SIZE": "2"}, "start launch/mpi.py instead"),
    ],
)
def test_what_cannot_be_joined_is_one_line(environment, message):
    with pytest.raises(ConfigError, match=message):
        launched(environment)


def test_a_node_that_is_no_host_has_the_address_that_slurm_reaches_it_by(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$3" = n1.invalid ] && echo "NodeName=$3 NodeAddr=10.1.2.3 NodeHostName=h"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert rendezvous.address_of("n1.invalid") == "10.1.2.3"


def test_the_program_says_it_in_one_line():
    environment = {
        **{name: os.environ[name] for name in ("PATH", "PYTHONPATH")},
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "0",
    }
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: SLURM_STEP_NUM_TASKS is set, but not SLURM_LOCALID")


PROGRAMS = {
    "launch/train.py": ["--dry-run"],
    "launch/warmstart.py": [],
    "tools/evaluate.py": ["--checkpoint", "none"],
    "tools/chat.py": ["--checkpoint", "none"],
    "tools/convert.py": ["hf-to-megatron", "--in", "none", "--out", "none"],
    "tools/serve.py": ["--model", "none"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("left_over", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1' in the environment"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started this as one of 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is set, but not"),
    ],
    ids=["RANK alone", "no rank", "mpirun", "half of srun"],
)
def test_names_that_a_launcher_left_behind_are_one_line(program, left_over, message, monkeypatch, capsys):
    for name in (*rendezvous.NAMES, *SRUN, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("a2tgpo.lifecycle.failure.GRACE_S", 0.0)
    monkeypatch.setattr(sys, "argv", [program, "--config", "none.yaml", *PROGRAMS[program]])
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    assert module.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
