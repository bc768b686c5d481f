"""Several processes: a training of two is that of one, stops in order, goes on, and ends as a whole when one fails.
two_ranks.py has what two processes check together."""
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from tiny_run import FIELDS, TEXT, environment, flags, losses, tiny_config, tiny_trainer

import tensorgrad as tg
from gpt import cli
from gpt.training import MetricsFile, load_run, read_metrics
from gpt.training.checkpoints import load_last

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
needs_mpi = pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
                               reason="mpi4py or mpiexec is not installed (extra dist)")
SETTINGS = FIELDS | {"gradient_accumulation_steps": 4, "batch_size": 2, "eval_iters": 3, "dropout": 0.0, "beta2": 0.99,
                     "dtype": "float64", "sample_interval": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))


def start(folder, program, *arguments, launcher=(MPIEXEC, "-n", "2"), **variables):
    """A program in its own process group, as two processes unless `launcher` says otherwise."""
    return subprocess.Popen([*launcher, sys.executable, str(ROOT / program), *map(str, arguments)], cwd=folder,
                            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment(folder) | variables, start_new_session=True)


def run(*arguments, **options):
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


@needs_mpi
def test_two_processes_train_as_one_does(tmp_path):
    config = tiny_config(tmp_path, **SETTINGS)
    code, out, err = run(tmp_path, "scripts/train.py", *flags(SETTINGS | {"data": config.data, "out_dir": "two"}))
    assert code == 0 and "Traceback" not in err, err
    assert out.count("iter 3/12") == 1 and "processes  2, each with" in out
    records = read_metrics(tmp_path / "two" / "metrics.jsonl")

    one = tiny_trainer(config, [MetricsFile(tmp_path / "one.jsonl")])
    one.fit()
    expected = read_metrics(tmp_path / "one.jsonl")
    assert [r["iter"] for r in records] == [r["iter"] for r in expected]
    for key in ("loss", "grad_norm", "lr", "val_loss", "val_bpb"):
        found, wanted = ([r[key] for r in side if key in r] for side in (records, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=key)

    model, _, _ = load_run(tmp_path / "two")
    assert load_last(tmp_path / "two", model)["iteration"] == 12
    for (name, p), q in zip(model.named_parameters(), one.model.parameters(), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


@needs_mpi
def test_ctrl_c_stops_both_and_what_was_saved_is_whole(tmp_path):
    config = tiny_config(tmp_path, **SETTINGS)
    fields = SETTINGS | {"data": config.data, "out_dir": "out", "max_iters": 100000, "eval_interval": 100000}
    process = start(tmp_path, "scripts/train.py", *flags(fields))
    metrics = tmp_path / "out" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 100
        while len(losses(read_metrics(metrics))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # which mpiexec passes on
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.count("stopping: saving first") == 1 and err.count("go on with: python scripts/train.py --resume") == 1
    trainer = tiny_trainer(config)
    trainer.load_state_dict(load_last(tmp_path / "out", trainer.model))
    assert trainer.iteration == len(losses(read_metrics(metrics))) > 0


@needs_mpi
def test_what_two_processes_check_together_and_one_that_fails_ends_both(tmp_path):
    code, out, err = run(tmp_path, "tests/two_ranks.py", tmp_path, PYTHONPATH=str(ROOT))
    assert {path.name for path in tmp_path.glob("content-?")} == {"content-0", "content-1"}, err
    assert code == 1 and not (tmp_path / "never").exists()
    assert "ZeroDivisionError: on purpose" in err and err.count("Traceback") == 1


@needs_mpi
def test_wrong_input_is_said_once(tmp_path):
    (tmp_path / "sums.txt").write_text(TEXT)
    fields = SETTINGS | {"data": tmp_path / "sums.txt", "gradient_accumulation_steps": 3}
    code, out, err = run(tmp_path, "scripts/train.py", *flags(fields))
    assert code == 2 and out == ""
    assert err.count("error: gradient_accumulation_steps = 3 cannot be shared out among 2 processes: make it a") == 1


def failing(message):
    def fail(*args):
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize("module, message", [
    (None, 'mpi4py is not installed: pip install -e ".[dist]"'),
    (types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(Get_size=lambda: 1),
                           Get_library_version=lambda: "Open MPI v5.0.7, package: Open MPI\n"),
     "sees 1: it is of another MPI (Open MPI v5.0.7, package: Open MPI) than the mpiexec"),
    (failing("cannot load MPI library\nlibmpi.so: no such file"),
     'mpi4py finds no MPI library (cannot load MPI library): pip install -e ".[dist]"'),
])
def test_what_is_missing_is_one_line_for_each_machine(module, message, monkeypatch, capsys):
    fake = types.ModuleType("mpi4py")
    if callable(module):
        fake.__getattr__ = lambda name: module() if name == "MPI" else object.__getattribute__(fake, name)
    else:
        fake.MPI = module
    monkeypatch.setitem(sys.modules, "mpi4py", None if module is None else fake)
    monkeypatch.setattr(tg.distributed, "_world", None)
    for local_rank, lines in (("0", 1), ("1", 0)):
        for name, value in (("PMI_SIZE", "4"), ("PMI_RANK", "2"), ("MPI_LOCALRANKID", local_rank)):
            monkeypatch.setenv(name, value)
        assert cli.train(["--max_iters=1"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == lines and (message in err) == bool(lines), err


def test_alone(tmp_path, monkeypatch):
    """Without mpiexec, or as its only process, nothing of MPI is imported and every collective is the value itself."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for variables in ({}, {"PMI_RANK": "0", "PMI_SIZE": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tg.distributed, "_world", None)
        world = tg.distributed.world()
        assert (world.rank, world.size, world.local_rank, tg.distributed.joined()) == (0, 1, 0, False)
    x = tg.tensor([1.0, 2.0])
    assert world.all_reduce_(x, "mean") is x and world.broadcast_(x).tolist() == [1, 2]
    assert world.any(True, False) == [True, False]
    state = tg.get_rng_state()
    world.split_random()
    with world.in_turn():
        world.barrier()
    world.abort(3)
    assert tg.get_rng_state() == state
    with pytest.raises(ValueError, match="op must be"):
        world.all_reduce_(x, "product")


@pytest.mark.parametrize("masks, threads", [
    ([{0, 1, 2, 3}] * 2, 2), ([{0, 1, 2, 3}] * 3, 1), ([{0, 1, 2}, {3, 4}], 3), ([{0, 1}] * 4, 1),
    ([{0, 1, 2, 3}, {0, 1}], 3)])
def test_processors_are_shared(masks, threads, monkeypatch):
    """As many threads as the processors that a rank may use, each counted as the part that falls to it."""
    from tensorgrad.kernels import pool

    monkeypatch.delenv("TENSORGRAD_THREADS", raising=False)
    monkeypatch.setattr(pool, "_share", None)
    monkeypatch.setattr(pool, "_pool", pool.Pool(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: masks[0], raising=False)
    communicator = types.SimpleNamespace(local_rank=0, _node=types.SimpleNamespace(allgather=lambda mine: masks))
    crowded = len(masks) > len(set().union(*masks))
    with pytest.warns(UserWarning, match="4 processes share 2 processors") if crowded else nullcontext():
        assert tg.distributed._share_processors(communicator) == threads
    assert pool.thread_count() == pool._pool.threads == threads
    monkeypatch.setenv("TENSORGRAD_THREADS", "5")
    with pytest.warns(UserWarning) if crowded else nullcontext():
        assert tg.distributed._share_processors(communicator) == 5


def test_cupy_has_what_is_called_of_nccl():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("NCCL is not installed (extra nccl)")
    assert isinstance(nccl.get_unique_id(), bytes)
    for name in ("FLOAT16", "FLOAT32", "FLOAT64", "BFLOAT16", "INT32", "INT64", "UINT8", "SUM", "MAX"):
        assert hasattr(nccl, f"NCCL_{name}"), name
    assert "sendbuf, intptr_t recvbuf, size_t count, int datatype, int op, intptr_t stream" in (
        nccl.NcclCommunicator.allReduce.__doc__)
    assert "buff, size_t count, int datatype, int root, intptr_t stream" in nccl.NcclCommunicator.bcast.__doc__


@pytest.mark.cuda
def test_nccl_with_one_gpu():
    """A communicator of one GPU that believes in two ranks: a sum is the array, a mean its half."""
    world = tg.distributed.Communicator()
    world._comm = types.SimpleNamespace(bcast=lambda place: place)
    x = tg.arange(1000, dtype=tg.float32, device="cuda")
    try:
        world._nccl(x.device)
    except tg.DeviceError as error:
        pytest.skip(str(error))
    world.size = 2
    assert world.all_reduce_(x).tolist() == list(range(1000)) == world.broadcast_(x).tolist()
    assert world.all_reduce_(x, "mean").tolist() == [i / 2 for i in range(1000)]
