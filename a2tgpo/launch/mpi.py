"""Agree over MPI where the ranks meet: torchrun's names for each process that mpirun started."""

from __future__ import annotations

import os
import socket
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Number of processes as set by the launchers of Open MPI, MPICH and Slurm; the first one found is used."""


def meet() -> dict[str, str]:
    """Return torchrun's names for this process, agreed over MPI, which is started and finalised here.

    Raises:
        RuntimeError: one line; there is no MPI library, it is not the launcher's, or the other machines cannot
            resolve rank 0's name.
    """
    mpi = load_mpi()
    # `agree` reports mpi4py's suspicion about mpirun in one line.
    warnings.filterwarnings("ignore", message="suspicious MPI", category=RuntimeWarning)
    mpi.Init()
    try:
        return agree(mpi.COMM_WORLD, mpi)
    finally:
        mpi.Finalize()


def load_mpi() -> ModuleType:
    """Return mpi4py's MPI module, not initialised yet."""
    import mpi4py

    mpi4py.rc.initialize = False  # otherwise the import would start MPI, and finalise it only at exit
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            "launch/mpi.py found no MPI library: load the cluster's MPI module, or install the package openmpi-bin "
            f"or mpich ({reason:.200})"
        ) from None
    return MPI


def agree(world: Comm, mpi: ModuleType) -> dict[str, str]:
    """Return torchrun's names for this process; every rank must call this."""
    rank, size = world.Get_rank(), world.Get_size()
    started = next((int(os.environ[name]) for name in SIZES if name in os.environ), 1)
    if size == 1 < started:
        library = mpi.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
        raise RuntimeError(
            f"the launcher started {started} processes, but each sees only itself through {library}: mpirun must "
            "belong to the same MPI as the library; srun needs --mpi=pmix or --mpi=pmi2, whichever that MPI "
            "supports"
        )
    machine = world.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = machine.Get_rank(), machine.Get_size()
    machine.Free()
    address, port = world.bcast(choose_place(is_one_machine=local_size == size) if rank == 0 else None)
    unresolved = [
        host for host in world.allgather(None if resolves(address) else socket.gethostname()) if host
    ]
    if unresolved:
        raise RuntimeError(
            f"rank 0's machine, {address!r}, cannot be resolved on {', '.join(sorted(set(unresolved)))}; "
            "export MASTER_ADDR, an address that all machines can reach"
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def choose_place(*, is_one_machine: bool) -> tuple[str, str]:
    """Return an address and a free port of this process, rank 0, for the other ranks."""
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if is_one_machine else socket.gethostname())
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return address, os.environ.get("MASTER_PORT") or str(port)


def resolves(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True
