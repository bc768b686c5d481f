"""Several processes that train together, each on its share of the processors or on a GPU of its own.

    mpiexec -n 4 python program.py                       # extra `dist`: mpi4py, and MPICH with its mpiexec

    world = tg.distributed.world()                       # rank, size; alone where no mpiexec started us
    for p in model.parameters():
        world.broadcast_(p)                              # all begin with the weights of rank 0
    world.split_random("cpu")                            # dropout masks of its own
    ...
    loss.backward()                                      # each process on other batches
    world.all_reduce_gradients_(optimizer, "mean")       # one collective for each flat gradient buffer
    optimizer.step()

Arrays of the CPU go through MPI, those of a GPU through NCCL (extra `nccl`), for which MPI only carries the meeting
place. All ranks must make the same calls in the same order. An exception that nobody catches ends all of them.
"""

import os
import sys
import warnings
from contextlib import contextmanager

import numpy as np

from .device import DeviceError, cpu
from .kernels.pool import share_processors
from .random import get_rng_state, set_rng_state
from .tensor import Tensor

_LAUNCHERS = (  # rank, size and rank on the machine, as MPICH's (also Intel's) and OpenMPI's mpiexec give them
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
_STREAMS = 2**40  # random streams that each rank has for itself
_world = None


def launched():
    """(rank, size, rank on this machine) as the environment says: (0, 1, 0) where no mpiexec started this process."""
    for names in _LAUNCHERS:
        rank, size, local = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and size.isdigit():
            return int(rank), int(size), int(local or rank)
    return 0, 1, 0


def world():
    """The Communicator of all processes that `mpiexec -n N` started; of this one alone where there was none. mpi4py is
    imported for N > 1 only. Raises DeviceError where it, or the MPI library of that mpiexec, is missing."""
    global _world
    if _world is None:
        _world = _join() if launched()[1] > 1 else Communicator()
    return _world


def joined():
    """Has `world()` brought this process together with others?"""
    return _world is not None and _world.size > 1


class Communicator:
    """The processes of a run. `rank` is this one's number, 0 <= rank < size; `local_rank` its number on this machine,
    which is also the number of its GPU; `threads` what it computes with, None where nobody else is there to share."""

    def __init__(self, mpi=None, node=None):
        self._mpi, self._node, self._gpu = mpi, node, None
        comm = self._comm = mpi and mpi.COMM_WORLD
        self.rank, self.size = (comm.Get_rank(), comm.Get_size()) if comm else (0, 1)
        self.local_rank = node.Get_rank() if node else 0
        self.threads = None

    def all_reduce_(self, x, op="sum"):
        """Replace `x`, a Tensor or NumPy array of the same shape on every rank, by the sum, "mean" or "max" over all
        ranks, in place. Returns x. Every rank gets the same bits."""
        array, device = _memory(x)
        self._all_reduce(array, device, op)
        return _changed(x)

    def broadcast_(self, x, root=0):
        """Replace `x`, a Tensor or NumPy array, by that of rank `root`, in place. Returns x."""
        array, device = _memory(x)
        if self.size > 1 and device.type == "cpu":
            self._comm.Bcast(array, root)
        elif self.size > 1:
            nccl, gpus = self._nccl(device)
            stream = device.xp.cuda.get_current_stream().ptr
            gpus.bcast(array.data.ptr, array.size, _nccl_type(nccl, array), root, stream)
        return _changed(x)

    def all_reduce_gradients_(self, optimizer, op="sum"):
        """all_reduce_ of the gradients of all parameters of an optimizer: one collective for each of its flat buffers,
        of which a group has one per dtype and device. A parameter that has a gradient on some ranks only counts as
        zeros on the others."""
        if self.size == 1:
            return
        buffers = optimizer.flat_buffers()
        given = np.array([p.grad is not None for buffer in buffers for p in buffer.params], np.uint8)
        self.all_reduce_(given, "max")
        for buffer in buffers:
            flags, given = given[: len(buffer.params)], given[len(buffer.params) :]
            if flags.any():
                buffer.adopt_gradients(flags)
                self._all_reduce(buffer.grad, buffer.device, op)
                for p in buffer.params:
                    if p.grad is not None:
                        p.grad._bump()

    def _all_reduce(self, array, device, op):
        if op not in ("sum", "mean", "max"):
            raise ValueError(f'all_reduce_: op must be "sum", "mean" or "max", not {op!r}')
        if self.size == 1:
            return
        if device.type == "cpu":
            self._comm.Allreduce(self._mpi.IN_PLACE, array, self._mpi.MAX if op == "max" else self._mpi.SUM)
        else:  # queued like any other work of the GPU: nobody waits
            nccl, gpus = self._nccl(device)
            kind, stream = nccl.NCCL_MAX if op == "max" else nccl.NCCL_SUM, device.xp.cuda.get_current_stream().ptr
            gpus.allReduce(array.data.ptr, array.data.ptr, array.size, _nccl_type(nccl, array), kind, stream)
        if op == "mean":
            array *= 1 / self.size

    def _nccl(self, device):
        """(CuPy's module, the communicator of the ranks' GPUs), made when the first array of a GPU is at hand."""
        if self._gpu is None:
            from .cuda_device import load_nccl

            nccl = load_nccl(device)
            device.use()
            place = self._comm.bcast(nccl.get_unique_id() if self.rank == 0 else None)
            self._gpu = nccl, nccl.NcclCommunicator(self.size, place, self.rank)
        device.use()
        return self._gpu

    def any(self, *flags):
        """For each flag, whether it is set on any rank: a list of bools, the same everywhere."""
        return [bool(flag) for flag in self.all_reduce_(np.array(flags, np.uint8), "max")]

    def barrier(self):
        """Wait until all ranks are here."""
        if self.size > 1:
            self._comm.Barrier()

    @contextmanager
    def in_turn(self):
        """Within this context one rank after the other: what the first makes, such as a file, the next ones find."""
        for _ in range(self.rank):
            self.barrier()
        yield
        for _ in range(self.size - self.rank):
            self.barrier()

    def split_random(self, device="cpu"):
        """From here on draw other numbers than the other ranks from the device's default generator: its state keeps
        the seed and goes to streams that are this rank's own. Rank 0 draws what a single process would."""
        state = get_rng_state(device)
        set_rng_state({**state, "calls": state["calls"] % _STREAMS + self.rank * _STREAMS}, device)

    def abort(self, code=1):
        """End all ranks at once, with this exit code of mpiexec (not 0). Alone: return."""
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            # mpiexec ends the others of one that leaves without MPI's farewell, after passing on what it has written;
            # with MPI_Abort that is lost now and then
            os._exit(code or 1)


def _memory(x):
    """(array, device) of a Tensor or NumPy array, checked: MPI and NCCL go by addresses."""
    array, device = (x.array, x.device) if isinstance(x, Tensor) else (x, cpu)
    if not isinstance(array, device.ndarray):  # a GPU's array in MPI's hands would end the process
        raise TypeError(f"a collective takes a Tensor or a NumPy array, not {type(x).__name__}")
    if not array.flags.c_contiguous:
        raise ValueError("a collective works in place on contiguous memory; call .contiguous() first")
    return array, device


def _changed(x):
    if isinstance(x, Tensor):
        x._bump()
    return x


def _nccl_type(nccl, array):
    name = getattr(nccl, f"NCCL_{array.dtype.name.upper()}", None)
    if name is None:
        raise TypeError(f"NCCL has no collectives for {array.dtype}")
    return name


def _join():
    """The Communicator of the processes that the launcher started, of which this is one."""
    rank, size, _ = launched()
    where = f"this is one of {size} processes that mpiexec started"
    try:
        from mpi4py import MPI
    except ImportError:
        raise DeviceError(f'{where}, but mpi4py is not installed: pip install -e ".[dist]"') from None
    except RuntimeError as error:  # "cannot load MPI library", over several lines
        reason = str(error).strip().split("\n")[0]
        raise DeviceError(f'{where}, but mpi4py finds no MPI library ({reason}): pip install -e ".[dist]"') from None
    if MPI.COMM_WORLD.Get_size() != size:
        raise DeviceError(f"{where}, but the MPI library that mpi4py loaded sees {MPI.COMM_WORLD.Get_size()}: it is of "
                          f"another MPI ({MPI.Get_library_version().split(chr(10))[0].strip()}) than the mpiexec; use "
                          "the mpiexec that the extra dist installs beside python")  # fmt: skip
    communicator = Communicator(MPI, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED))
    communicator.threads = _share_processors(communicator)
    _abort_on_error(communicator)
    return communicator


def _share_processors(communicator):
    """Take this rank's share of the processors: of each, as much as there are ranks on this machine that may use it.
    A launcher that binds ranks to cores is thereby respected. Returns the number of threads."""
    node, everywhere = communicator._node, set(range(os.cpu_count() or 1))
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everywhere
    all_ranks = node.allgather(mine)
    share = sum(1 / sum(number in other for other in all_ranks) for number in mine)
    usable = len(set().union(*all_ranks))
    if len(all_ranks) > usable and communicator.local_rank == 0:
        message = f"{len(all_ranks)} processes share {usable} processors and mostly wait; start at most {usable} here"
        warnings.warn_explicit(message, UserWarning, "mpiexec", 1)
    return share_processors(max(1, int(share + 1e-6)))


def _abort_on_error(communicator):
    """An exception that nobody catches ends all ranks; otherwise they would wait for this one forever."""
    before = sys.excepthook

    def hook(kind, error, trace):
        before(kind, error, trace)
        communicator.abort(1)

    sys.excepthook = hook


__all__ = ["Communicator", "joined", "launched", "world"]
