"""Choose the address at which mpirun's ranks meet, and return it in torchrun's variables."""

from __future__ import annotations

import os
import socket
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables that Open MPI, MPICH and Slurm set to the number of processes. The first of these variables that is set
is used."""


def meet() -> dict[str, str]:
    """Return the values of torchrun's variables for this process; every rank must call this.

    The function starts MPI and finalises it.

    Raises:
        RuntimeError: with a one-line message, if MPI cannot be used, or if a machine cannot resolve the name of rank
            0.
    """
    mpi = load_mpi()
    # mpi4py warns if it suspects that mpirun belongs to another MPI library. `agree` reports this case in one line.
    warnings.filterwarnings("ignore", message="suspicious MPI", category=RuntimeWarning)
    mpi.Init()
    try:
        return agree(mpi.COMM_WORLD, mpi)
    finally:
        mpi.Finalize()


def load_mpi() -> ModuleType:
    """Return mpi4py's MPI module without starting MPI."""
    import mpi4py

    mpi4py.rc.initialize = False  # if True, the import would start MPI and finalise it only at exit
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
    """Return the values of torchrun's variables for this process; every rank of `world` must call this."""
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
    """Return an address and a free port at which the other ranks can reach rank 0; only rank 0 calls this."""
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
