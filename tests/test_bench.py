"""scripts/bench.py: what its last line holds, and that its PyTorch peer is the same model."""
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tensorgrad as tg
from gpt import GPT, GPTConfig

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def bench(*arguments):
    command = [sys.executable, str(SCRIPTS / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def last_line(*arguments):
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "machine", "results", "skipped"} <= set(result)
    assert {"cpu", "cores", "threads", "versions", "revision"} <= set(result["machine"])
    return result


def test_train(tmp_path):
    path = tmp_path / "train.json"
    result = last_line("train", "--size", "S", "--steps", "1", "--rounds", "1", "--level", "numpy", "--threads", "1",
                       "--json", str(path))
    assert json.loads(path.read_text()) == result
    rows = {row["contender"]: row for row in result["results"]}
    ours = rows["ours numpy"]
    assert {"ms", "min_ms", "cpu_ms", "tokens_per_s", "peak_mb", "speed_vs_torch", "memory_vs_torch"} <= set(ours)
    assert ours["ms"] > 0 and ours["tokens_per_s"] == pytest.approx(1e3 * 12 * 64 / ours["ms"])
    assert ours["peak_mb"] >= ours["imported_mb"] > 0
    assert 0 < ours["loss"] < 4.3  # ln 65 = 4.17, and the one batch is being learned
    if importlib.util.find_spec("torch") is None:
        assert result["skipped"] == {"torch eager at S": "torch is not installed"}
        assert ours["speed_vs_torch"] is None
    else:
        torch = rows["torch eager"]
        assert ours["speed_vs_torch"] == pytest.approx(torch["ms"] / ours["ms"])
        assert ours["memory_vs_torch"] == pytest.approx(torch["peak_mb"] / ours["peak_mb"])
        assert torch["parameters"] == ours["parameters"]


def test_ops_beside_an_earlier_revision(monkeypatch):
    """Every routine has a time, a floor and, beside a revision, a ratio."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPTS, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("no git history here")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.ops import costs
    from benchmarks.sizes import SIZES

    result = last_line("ops", "--size", "S", "--steps", "1", "--rounds", "1", "--level", "numpy", "--threads", "1",
                       "--peers", "none", "--against", head.stdout.strip())
    rows = [row for row in result["results"] if row["contender"] == "ours numpy"]
    assert [row["routine"] for row in rows] == list(costs(SIZES["S"]))
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 and row["speed_vs_before"] > 0 for row in rows)
    assert len(result["results"]) == 2 * len(rows)


def test_import():
    result = last_line("import", "--rounds", "1", "--threads", "1", "--peers", "none")
    imports = {row["module"]: row for row in result["results"] if "module" in row}
    assert imports["numpy"]["over_numpy"] == 1
    assert imports["tensorgrad"]["over_numpy"] == pytest.approx(imports["tensorgrad"]["ms"] / imports["numpy"]["ms"])
    adds = {row["library"]: row["microseconds"] for row in result["results"] if "library" in row}
    assert adds["tensorgrad"] > adds["numpy"] > 0


def test_wrong_input_exits_with_2_and_failures_of_ours_with_1():
    assert bench("train", "--size", "XXL").returncode == 2
    assert bench("train", "--steps", "0").returncode == 2
    done = bench("train", "--against", "no-such-revision")
    assert done.returncode == 2 and "no-such-revision" in done.stderr
    done = bench("train", "--size", "S", "--dropout", "7", "--peers", "none", "--rounds", "1")
    assert done.returncode == 1 and "dropout" in done.stderr.splitlines()[-1]


def test_torch_peer_is_the_same_model(monkeypatch):
    torch = pytest.importorskip("torch", reason="the peer is written in PyTorch")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.peers import TorchGPT
    from benchmarks.sizes import Size

    size = Size(batch=2, block=8, layers=2, heads=2, width=16, vocab=11, dropout=0.0, steps=1, warm_up=0)
    ours = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    assert [tuple(p.shape) for p in ours.parameters()] == size.parameter_shapes()
    peer = TorchGPT(size)
    names = dict(peer.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            names.pop(name).copy_(torch.from_numpy(p.detach().numpy()))
    assert not names
    idx, targets = tg.randint(0, 11, (2, 8)), tg.randint(0, 11, (2, 8))
    optimizers = [model.configure_optimizers(0.1, 1e-3, (0.9, 0.99)) for model in (ours, peer)]
    for _ in range(3):
        losses = []
        for library, model, optimizer in zip((tg, torch), (ours, peer), optimizers, strict=True):
            _, loss = model(*(library.from_numpy(x.numpy()) for x in (idx, targets)))
            optimizer.zero_grad()
            loss.backward()
            library.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_storage(tmp_path, monkeypatch):
    """Perplexity by way of storing; the figure for float32 is that of the model itself."""
    from tiny_run import tiny_config, tiny_trainer

    from gpt.training.checkpoints import save_best, start_run
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path, max_iters=1, block_size=64)
    trainer = tiny_trainer(config)
    start_run(config.out_dir, config, trainer.dataset.tokenizer)
    save_best(config.out_dir, trainer.model)
    text = tmp_path / "held_out.txt"
    text.write_text("1 and 2 make 3\n" * 40)
    rows = last_line("storage", "--model", config.out_dir, "--text", str(text), "--tokens", "50")["results"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float16", "int8"]
    ids = trainer.dataset.tokenizer.encode(text.read_text()[540:])[:51]
    with tg.no_grad():
        _, loss = trainer.model.eval()(tg.tensor([ids[:-1]]), tg.tensor([ids[1:]]))
    assert rows[0]["tokens"] == 50 and abs(rows[0]["loss"] - loss.item()) < 1e-5
    assert all(0 < abs(row["loss"] - rows[0]["loss"]) < 0.01 for row in rows[1:])
    assert rows[0]["weights_mb"] > 1.8 * rows[1]["weights_mb"] > 2.2 * rows[3]["weights_mb"]
    assert bench("storage").returncode == 2


def test_cuda_benchmark_on_the_cpu():
    """All of `bench.py cuda` but the GPU: the same programs, small."""
    arguments = ("--size", "tiny", "--steps", "1", "--device", "cpu", "--threads", "1")
    result = last_line("cuda", *arguments, "--peers", "eager")
    rows = {row["contender"]: row for row in result["results"] if "contender" in row}
    ours = rows["ours"]
    assert ours["tokens_per_s"] == pytest.approx(1e3 * 2 * 32 / ours["ms"])
    assert set(ours["phases_ms"]) == {"forward", "backward", "norm", "update"} and ours["peak_mb"] > 0
    assert 0 < ours["loss"] < 6 and ours["tflops"] > 0
    if importlib.util.find_spec("torch"):
        assert ours["speed_vs_eager"] == pytest.approx(ours["tokens_per_s"] / rows["torch eager"]["tokens_per_s"])
        assert ours["memory_vs_eager"] > 0
    decoded = {(row["batch"], row["graph"]): row for row in result["results"] if "generated" in row}
    assert set(decoded) == {(1, True), (1, False), (8, True), (8, False)}
    assert all(row["tokens_per_s"] > 0 and row["ms_per_token"] > 0 for row in decoded.values())
    measured = {row["name"]: row for row in result["results"] if "name" in row}
    assert {"layer_norm", "cross_entropy backward", "attention backward", "adamw", "linear up"} <= set(measured)
    assert all(row["share"] > 0 for row in measured.values())


def test_cuda_benchmark_keeps_what_was_measured(monkeypatch):
    """It runs unattended: what fails costs its own part only, and is said in the end."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import cuda, runner

    def work(contender, job, threads, limit=None, **spec):
        if contender.name == "ours" or spec.get("graph"):
            return {"skipped": f"{job} broke"}
        row = dict.fromkeys(("ms", "tokens_per_s", "tflops", "peak_mb", "waits_per_step", "loss", "ms_per_token"), 1.0)
        return row | {"phases_ms": dict.fromkeys(cuda.PHASES, 1.0), "gpu": "", "versions": {}}

    monkeypatch.setattr(runner, "work", work)
    kept = []
    options = types.SimpleNamespace(size=["tiny"], peers=["eager"], device="cpu", steps=1, batch=None, rounds=1,
                                    threads=1, no_kernels=False,
                                    keep=lambda rows, skipped: kept.append((list(rows), dict(skipped))))
    with pytest.raises(runner.BenchError, match="train tiny: cuda broke; generate .* broke; kernels tiny: .* broke$"):
        cuda.report(options)
    rows, skipped = kept[-1]
    assert [row.get("contender") or row["graph"] for row in rows] == ["torch eager", False, False]
    assert len(kept) == 3 and len(skipped) == 4 and kept[0][0] == rows[:1]


def test_a_process_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import runner

    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(runner, "SCRIPT", script)
    assert runner.work(runner.Contender("other"), "train", 1, limit=0.2) == {"skipped": "took more than 0.2 s"}


def test_cuda_benchmark_without_a_gpu_says_what_is_missing():
    if tg.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("--device", "cuda", "--size", "tiny", "--steps", "1", "--peers", "none")
    assert done.returncode == 1 and "'cuda'" in done.stderr.splitlines()[-1]
