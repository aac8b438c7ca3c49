"""Set torchrun's variables from the variables of the launcher that started this process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from a2tgpo.io.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets, and that torch.distributed, Megatron and vLLM read."""
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
"""torchrun's variable -> srun's variable. In a batch script, outside srun, SLURM_STEP_NUM_TASKS is not set."""
LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE"),
}
"""Launcher -> its variables for the rank of a process and for the number of processes."""
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Range of ports for steps of Slurm jobs: above the ports of services, below the ports that Linux assigns."""
PORTS_PER_JOB = 32


def join_launcher() -> None:
    """If srun started this process as one of several, set torchrun's variables. Call this before the import of torch.

    Raises:
        ConfigError: with a one-line message, if a variable is unusable, or if mpirun started a script that does not
            use MPI.
    """
    found = launched(os.environ)
    if found is None:
        return
    if "RANK" not in os.environ:
        forget_torchrun(os.environ)
    os.environ.update(found)
    # If several processes share few cores, their thread pools spin and slow each other down many times over.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def forget_torchrun(environment: MutableMapping[str, str]) -> None:
    """Remove from `environment` the variables that belong to the torchrun of another job.

    They are the options of that torchrun (PET_*) and the settings of its ranks (TORCHELASTIC_*). With PET_NNODES=2,
    for example, torchrun would wait for a second node. With TORCHELASTIC_USE_AGENT_STORE=True, all ranks would wait
    for a store that no process serves.
    """
    for name in [name for name in environment if name.startswith(("PET_", "TORCHELASTIC_"))]:
        del environment[name]


def launched(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the values of the variables `NAMES` for this process, or None if the process is the only one.

    Under srun, the default of MASTER_ADDR is the first node of the step. The default of MASTER_PORT is `step_port`.

    Raises:
        ConfigError: for the same reasons as `join_launcher`.
    """
    if "RANK" in environment:
        found = _complete({name: environment[name] for name in NAMES if name in environment}, "RANK")
        _refuse_left_over(environment)
        return found
    # Check Open MPI before Slurm, because Open MPI's mpirun starts processes in a step of srun. Check MPICH after
    # Slurm, because srun also sets the variables of MPICH.
    _refuse_mpirun(environment, "OMPI_COMM_WORLD_SIZE")
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_slurm(environment)
    _refuse_mpirun(environment, "PMI_SIZE")
    return None


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: environment[source] for name, source in SLURM_NAMES.items() if source in environment}
    found |= {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    if "MASTER_ADDR" not in found and "SLURM_STEP_NODELIST" in environment:
        found["MASTER_ADDR"] = address_of(first_host(environment["SLURM_STEP_NODELIST"]))
    if "MASTER_PORT" not in found and "SLURM_JOB_ID" in environment:
        found["MASTER_PORT"] = str(step_port(environment))
    return _complete(found, "SLURM_STEP_NUM_TASKS")


def _complete(found: dict[str, str], because: str) -> dict[str, str]:
    """Return `found` if no variable is missing and each value is allowed, else raise `ConfigError`."""
    missing = [name for name in NAMES if name not in found]
    if missing:
        sources = " ".join(SLURM_NAMES.get(name, name) for name in missing)
        wanted = " ".join(missing) if because == "RANK" else sources
        raise ConfigError(
            f"{because} is set, but not {wanted}: set all of {' '.join(NAMES)}, as torchrun does, or unset {because} "
            "for a single process"
        )
    rank, world_size = _number(found, "RANK"), _number(found, "WORLD_SIZE")
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}; allowed: below WORLD_SIZE ({world_size})")
    _number(found, "LOCAL_RANK")
    if not 0 < _number(found, "MASTER_PORT") < 65536:
        raise ConfigError(f"MASTER_PORT is {found['MASTER_PORT']}; allowed: 1 to 65535")
    return found


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r} in the environment; allowed: a whole number, 0 or more")
    return int(text)


def _refuse_left_over(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` if this process's launcher is not torchrun and contradicts RANK and WORLD_SIZE."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return
    mine = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    by_launcher = {
        launcher: (_number(environment, rank, 0), _number(environment, size, 1))
        for launcher, (rank, size) in LAUNCHERS.items()
    }
    several = {launcher: names for launcher, names in by_launcher.items() if names[1] > 1}
    if several and mine not in several.values():
        launcher, (rank, size) = next(iter(several.items()))
        raise ConfigError(
            f"RANK is {mine[0]} and WORLD_SIZE {mine[1]} in the environment, but {launcher} started this process as "
            f"{rank} of {size}: unset {' '.join(NAMES)}, which another job has left behind"
        )


def _refuse_mpirun(environment: Mapping[str, str], name: str) -> None:
    if _number(environment, name, 1) > 1:
        raise ConfigError(
            f"mpirun started this as one of {environment[name]} processes, which cannot find each other; "
            "start launch/mpi.py instead"
        )


def first_host(node_list: str) -> str:
    """Return the first name in a node list of Slurm, e.g. rack1node07 for rack[1-2]node[07-09,12],login."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", node_list)
    if first is None or (first.group() != node_list and node_list[first.end()] != ","):
        raise ConfigError(f"SLURM_STEP_NODELIST is {node_list!r}; allowed: names, such as node[01-04]")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def address_of(node: str) -> str:
    """Return `node` if this name can be resolved, else the address that Slurm itself uses for the node."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", node, "--oneliner"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    address = re.search(r"\bNodeAddr=(\S+)", shown)
    if address is None:
        raise ConfigError(
            f"cannot resolve {node!r}, the first node of this step; export MASTER_ADDR, the address of "
            "rank 0's machine"
        )
    return address.group(1)


def step_port(environment: Mapping[str, str]) -> int:
    """Return the port at which all tasks of this job's step meet. Neighbouring jobs and steps get different ports."""
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    return FIRST_PORT + (job * PORTS_PER_JOB + step) % NUM_PORTS
