"""What two processes check together: `mpiexec -n 2 python two_ranks.py FOLDER`, from test_distributed.py. At its end
one of them fails, which must end both."""
import ctypes
import signal
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import standin_device
from mpi4py import MPI
from tiny_run import losses, tiny_config, tiny_trainer

import tensorgrad as tg
import tensorgrad.cuda_device
from gpt.text import IGNORE_INDEX
from gpt.training import Checkpoints, Interrupted, evaluate, read_metrics, train, validation_batches
from gpt.training.checkpoints import load_last
from tensorgrad import nn, optim


def collectives(world):
    rank = world.rank
    for dtype in (np.float32, np.float64, np.int64, np.uint8):
        x = np.arange(5, dtype=dtype) + rank
        assert world.all_reduce_(x) is x and x.tolist() == [1, 3, 5, 7, 9], dtype
    x = tg.full((2, 3), float(rank))
    version = x.version()[0]
    assert world.all_reduce_(x, "mean").tolist() == [[0.5] * 3] * 2 and x.version()[0] > version
    assert world.all_reduce_(tg.tensor([rank, -rank]), "max").tolist() == [1, 0]
    assert world.broadcast_(tg.tensor([rank, 7.0]), root=1).tolist() == [1, 7]
    assert world.all_reduce_(tg.tensor(2.0)).item() == 4
    assert world.any(rank == 0, False, True) == [True, False, True]
    with pytest.raises(ValueError, match="contiguous"):
        world.all_reduce_(tg.zeros(2, 3).T)
    with pytest.raises(TypeError, match="a Tensor or a NumPy array, not list"):
        world.broadcast_([1.0])


def gradients(world):
    """Parameters of two dtypes; one has a gradient on rank 1 only, one nowhere, and somebody holds earlier ones."""
    values = [tg.full((3,), float(i), requires_grad=True) for i in range(4)]
    values.append(tg.ones(2, dtype=tg.float64, requires_grad=True))
    a, alone, unused, held, wide = values
    optimizer = optim.SGD([{"params": [a, alone, unused]}, {"params": [held, wide]}], lr=1.0)
    (held * 5 + alone * 5).sum().backward()
    before = [held.grad, alone.grad] if world.rank == 0 else []  # on one rank: the other goes on in the old memory
    optimizer.zero_grad()
    loss = (a * (1 + world.rank)).sum() + (held * 2).sum() + (wide * 3).sum()
    if world.rank == 1:
        loss = loss + (alone * 7).sum()
    loss.backward()
    world.all_reduce_gradients_(optimizer)
    assert [p.grad.tolist() for p in (a, alone, held, wide)] == [[3.0] * 3, [7.0] * 3, [4.0] * 3, [6.0] * 2]
    assert unused.grad is None and all(grad.tolist() == [5.0] * 3 for grad in before)
    optimizer.step()
    assert [p.tolist() for p in values] == [[-3.0] * 3, [-6.0] * 3, [2.0] * 3, [-1.0] * 3, [-5.0] * 2]
    optimizer.zero_grad()
    (a * 1).sum().backward()
    world.all_reduce_gradients_(optimizer, "mean")
    assert a.grad.tolist() == [1.0] * 3 and held.grad is None


def shares(world, folder):
    """Random streams, turns, and an evaluation of three batches."""
    tg.manual_seed(3)
    first = tg.rand(4)
    tg.manual_seed(3)
    world.split_random()
    own = tg.rand(4)
    assert (own.tolist() == first.tolist()) == (world.rank == 0)
    tg.manual_seed(0)
    path = folder / "turns"
    with world.in_turn():
        path.write_text(f"{path.read_text() if path.exists() else ''}{world.rank}")
    assert path.read_text() == "01"

    class Bigrams(nn.Embedding):
        def forward(self, x, y):
            logits = super().forward(x)  # (B, T, V)
            return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    model = Bigrams(5, 5)
    tokens = np.arange(100) * 7 % 5
    batches, sizes = list(validation_batches(tokens, 8, 5)), np.array([0, 1, 2, 1, 3])
    assert len(batches) == 3 and len(batches[-1][0]) < 5
    together = evaluate(model, batches[world.rank :: 2], sizes, world=world)
    assert together.tokens == 99
    np.testing.assert_allclose(together.loss, evaluate(model, batches, sizes).loss, rtol=1e-12)


def weighted(world, folder, settings):
    """Batches with different numbers of targets: loss and gradients are those of one process."""

    class Masked:
        def __init__(self, batches):
            self.batches, self.left_out = batches, 0

        def next(self):
            x, y = self.batches.next()
            y[:, : self.left_out] = IGNORE_INDEX
            self.left_out += 5
            return x, y

    config = settings(dtype="float64", gradient_accumulation_steps=4, dropout=0.0)
    found = []
    for communicator in (world, tg.distributed.Communicator()):
        trainer = tiny_trainer(config)
        trainer.world, trainer.batches = communicator, Masked(trainer.batches)
        loss = communicator.all_reduce_(trainer._accumulate_gradients())
        communicator.all_reduce_gradients_(trainer.optimizer)
        assert trainer.evaluate().tokens == config.eval_iters * config.batch_size * config.window
        found.append([loss.numpy(), *(p.grad.numpy() for p in trainer.model.parameters())])
    for together, alone in zip(*found, strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-14)


def resumed(world, folder, settings):
    """Six steps with dropout; and three, then three more in a new Trainer: the same losses."""
    whole = settings(out_dir=str(folder / "whole"), gradient_accumulation_steps=4, max_iters=6, dropout=0.3)
    half = replace(whole, out_dir=str(folder / "half"), max_iters=3, lr_decay_iters=6)
    runs = whole, half, replace(whole, out_dir=half.out_dir, resume=half.out_dir)
    for config in runs:
        train(config, say=lambda text: None)
        assert tg.get_rng_state()["calls"] // 2**40 == world.rank, "each drops others"
        world.barrier()  # the first one has written
    found = [losses(read_metrics(Path(config.out_dir) / "metrics.jsonl")) for config in runs[:2]]
    assert found[0] == found[1] and len(found[0]) == 6


def interrupted(world, folder, settings):
    """Ctrl-C reaches the second process only, within a step, then an evaluation: both stop, and the first one saves."""
    trainer = tiny_trainer(settings(gradient_accumulation_steps=2))
    schedule = trainer.schedule
    trainer.schedule = lambda i: (world.rank == i - 1 == 1 and signal.raise_signal(signal.SIGINT)) or schedule(i)
    with pytest.raises(Interrupted, match="iteration 3"):
        trainer.fit()

    config = settings(gradient_accumulation_steps=2, eval_iters=1000)
    trainer = tiny_trainer(config, [Checkpoints(folder / "interrupted")])
    sizes = trainer.token_bytes

    class Pressing:
        def __getitem__(self, ids):
            if world.rank == 1 and not trainer._interrupted:
                signal.raise_signal(signal.SIGINT)
            return sizes[ids]

    trainer.token_bytes = Pressing()
    with pytest.raises(Interrupted, match="iteration 0"):
        trainer.fit()
    assert trainer.evaluated_at is None
    world.barrier()
    assert load_last(folder / "interrupted", trainer.model)["iteration"] == 0


def on_gpus(world, folder, settings):
    """A training run where the GPUs are the stand-in and NCCL adds up the memory at the addresses that it is given."""
    calls = []

    class NcclCommunicator:
        def __init__(self, size, place, rank):
            assert (size, place, rank) == (2, b"meet here", world.rank)

        def allReduce(self, source, target, count, kind, op, stream):
            assert source == target and op == "sum"
            calls.append(count)
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, self.memory(target, count, kind))

        def bcast(self, target, count, kind, root, stream):
            MPI.COMM_WORLD.Bcast(self.memory(target, count, kind), root)

        @staticmethod
        def memory(address, count, kind):
            return np.frombuffer((ctypes.c_char * (count * np.dtype(kind).itemsize)).from_address(address), kind)

    nccl = types.SimpleNamespace(NCCL_FLOAT32="float32", NCCL_SUM="sum", NCCL_MAX="max",
                                 get_unique_id=lambda: b"meet here", NcclCommunicator=NcclCommunicator)
    tensorgrad.cuda_device.load_nccl = lambda spec: nccl
    standin_device.install(pytest.MonkeyPatch(), count=2)
    found = {}
    for device in ("cpu", "cuda"):
        config = settings(device=device, out_dir=str(folder / device), gradient_accumulation_steps=2, dropout=0.0,
                          max_iters=4, eval_interval=100, lr_decay_iters=12)
        trainer = train(config, say=lambda text: None)
        assert str(trainer.model.lm_head.weight.device) == (device if device == "cpu" else f"cuda:{world.rank}")
        found[device] = trainer.model.lm_head.weight.cpu().detach().numpy().copy()
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-4, atol=1e-6)
    buffers = [buffer.grad.size for buffer in trainer.optimizer.flat_buffers()]
    assert calls == [1, *buffers] * 4  # of each step, the loss and the gradients
    theirs = found["cuda"].copy()
    assert (world.broadcast_(theirs, root=1) == found["cuda"]).all(), "the ranks' weights have parted"
    if world.rank == 0:
        runs = [losses(read_metrics(folder / device / "metrics.jsonl")) for device in found]
        np.testing.assert_allclose(list(runs[1].values()), list(runs[0].values()), rtol=1e-4)


if __name__ == "__main__":
    folder, world = Path(sys.argv[1]), tg.distributed.world()
    assert world.size == 2 and world.local_rank == world.rank and world.threads >= 1
    with world.in_turn():
        base = tiny_config(folder)  # which writes the text
    collectives(world)
    gradients(world)
    shares(world, folder)
    for check in (weighted, resumed, interrupted, on_gpus):
        check(world, folder, partial(replace, base))
    (folder / f"content-{world.rank}").touch()
    world.barrier()
    if world.rank == 1:
        raise ZeroDivisionError("on purpose")
    world.barrier()
    (folder / "never").touch()
