"""The training loop on the stand-in for a GPU: it queues steps without waiting, reads results when they are logged, and
computes what it computes on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import standin
from standin_device import gpu, kernels  # noqa: F401
from test_standin_graph import machine_for
from tiny_run import losses, tiny_config, tiny_trainer

import tensorgrad as tg
from gpt.errors import UserError
from gpt.text.finetune import Examples
from gpt.training import Callback, Checkpoints, MetricsFile, read_metrics
from gpt.training.checkpoints import load_last


class Recorder(Callback):
    def __init__(self):
        self.records, self.waits = [], {}

    def on_step(self, trainer, record):
        self.records.append(record)

    def on_evaluation(self, trainer, record):
        self.records.append(record)


def tiny(config, *callbacks):
    if config.dtype in ("bfloat16", "float16"):
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype, config.dtype = config.dtype, "float32"
    trainer = tiny_trainer(config, callbacks)  # weights are float32
    config.dtype = dtype
    return type(trainer)(trainer.model, config, trainer.dataset, callbacks)


def run(config, *callbacks):
    recorder = Recorder()
    trainer = tiny(config, recorder, *callbacks)
    trainer.fit()
    return trainer, recorder.records


def test_results_are_those_of_the_cpu(tmp_path, gpu):  # noqa: F811
    found = {}
    for device in ("cpu", "cuda"):
        changes = dict(device=device, dropout=0.0, log_interval=4, max_iters=10, eval_interval=5, sample_interval=3)
        _, records = run(tiny_config(tmp_path, **changes))
        assert [r["iter"] for r in records if "loss" in r] == list(range(10))
        assert all(r["tokens_per_s"] > 0 for r in records if "loss" in r)
        found[device] = [r.get("loss", r.get("val_loss")) for r in records]
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-4)


def test_the_host_waits_only_to_log(tmp_path, gpu):  # noqa: F811
    config = tiny_config(tmp_path, device="cuda", log_interval=10, max_iters=20, eval_interval=100, dropout=0.1,
                         gradient_accumulation_steps=2)
    trainer = tiny(config, Recorder())
    trainer._train_step()
    waits = []
    for _ in range(19):
        with standin.counting() as found:
            trainer._train_step()
        waits.append(len(found))
    quiet = [n for i, n in enumerate(waits, 1) if i % 10 and (i + 1) % 10]
    assert set(quiet) == {0}, waits
    assert 0 < sum(waits) <= 2 * 19 + 4, "a loss and a norm per step, and one check of ids per report"


def test_a_resumed_run_repeats_the_bits(tmp_path, gpu):  # noqa: F811
    whole = tiny_config(tmp_path, device="cuda", log_interval=5, max_iters=12)
    _, records = run(whole)
    part = tiny_config(tmp_path, device="cuda", log_interval=5, max_iters=8, lr_decay_iters=12)
    folder = tmp_path / "run"
    folder.mkdir()
    run(part, Checkpoints(folder), MetricsFile(folder / "metrics.jsonl"))
    whole.resume = str(folder)
    trainer = tiny(whole, recorder := Recorder())
    trainer.load_state_dict(load_last(folder, trainer.model))
    trainer.fit()
    assert losses(recorder.records) == {k: v for k, v in losses(records).items() if k >= 8}
    assert len(read_metrics(folder / "metrics.jsonl")) > 0


def test_a_loss_that_is_not_finite_is_found_before_anything_is_saved(tmp_path, gpu):  # noqa: F811
    trainer = tiny(tiny_config(tmp_path, device="cuda", log_interval=100, eval_interval=4), Recorder())

    class Spoil(Callback):
        def on_evaluation(self, trainer, record):
            if trainer.iteration == 4:
                trainer.model.lm_head.weight.array.fill(np.nan)
            assert trainer.iteration < 8, "evaluated, and would have saved"

    trainer.callbacks.append(Spoil())
    with pytest.raises(UserError, match="the loss is nan at iteration 4"):
        trainer.fit()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, device, tmp_path, gpu):  # noqa: F811
    changes = dict(device=device, dropout=0.0, log_interval=3, max_iters=12)
    _, full = run(tiny_config(tmp_path, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # where the CPU has no bfloat16 products
        trainer, half = run(tiny_config(tmp_path, dtype=dtype, **changes))
    np.testing.assert_allclose(list(losses(half).values()), list(losses(full).values()), rtol=0.03)
    assert all(p.dtype == tg.float32 for p in trainer.model.parameters())
    assert ("scaler" in trainer.state_dict()) == (dtype == "float16")


def test_float16_leaves_a_step_out_and_scales_less(tmp_path, gpu):  # noqa: F811
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    trainer = tiny(tiny_config(tmp_path, device="cuda", dtype="float16", dropout=0.0), Recorder())
    trainer.scaler._initial = (2.0**40, 0)  # gradients overflow
    trainer._train_step()
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(np.isfinite(p.detach().cpu().numpy()).all() for p in trainer.model.parameters())
    state = trainer.state_dict()
    other = tiny(tiny_config(tmp_path, device="cuda", dtype="float16", dropout=0.0), Recorder())
    other.load_state_dict(state)
    assert other.scaler.get_scale() == 2.0**39


# ---- a step as a CUDA graph ---


def run_graph(config, *callbacks, resume=None):
    """As `run`, with what recorded and launched the graphs."""
    with pytest.MonkeyPatch.context() as patch:
        trainer = tiny(config, recorder := Recorder(), *callbacks)
        machine = machine_for(patch, trainer.optimizer)
        if resume:
            trainer.load_state_dict(load_last(resume, trainer.model))
        trainer.fit()
    return trainer, recorder.records, machine


@pytest.mark.parametrize("changes", [dict(), dict(dtype="bfloat16"), dict(gradient_accumulation_steps=3, grad_clip=0.0),
                                     dict(grad_clip=0.1, log_interval=1)], ids=str)
def test_steps_as_a_graph(changes, tmp_path, kernels):  # noqa: F811
    """Losses, norms and evaluations are the same; recorded once."""
    fields = dict(device="cuda", dropout=0.0, log_interval=5, max_iters=11, eval_interval=4) | changes
    _, plain = run(tiny_config(tmp_path, **fields))
    trainer, records, machine = run_graph(tiny_config(tmp_path, cuda_graph=True, **fields))
    assert [g.launches for g in machine.graphs] == [11] and machine.host_copies == []
    assert [r.keys() for r in records] == [r.keys() for r in plain]
    for name in ("loss", "grad_norm", "val_loss"):
        np.testing.assert_allclose([r[name] for r in records if name in r], [r[name] for r in plain if name in r],
                                   rtol=1e-5 if "dtype" not in changes else 1e-3)
    assert {int(e["step"]) for e in trainer.optimizer.state_dict()["state"].values()} == {11}


def test_a_graph_resumes_and_is_recorded_again(tmp_path, kernels):  # noqa: F811
    whole = tiny_config(tmp_path, device="cuda", dropout=0.0, log_interval=5, max_iters=12, cuda_graph=True)
    _, records, _ = run_graph(whole)
    part = tiny_config(tmp_path, device="cuda", dropout=0.0, log_interval=5, max_iters=8, lr_decay_iters=12,
                       cuda_graph=True)
    folder = tmp_path / "run"
    folder.mkdir()
    run_graph(part, Checkpoints(folder), MetricsFile(folder / "metrics.jsonl"))
    _, resumed, _ = run_graph(whole, resume=folder)
    wanted = {k: v for k, v in losses(records).items() if k >= 8}
    assert losses(resumed).keys() == wanted.keys()
    np.testing.assert_allclose(list(losses(resumed).values()), list(wanted.values()), rtol=1e-6)

    class GoBack(Callback):
        def on_evaluation(self, trainer, record):
            if trainer.iteration == 8:
                trainer.load_state_dict(load_last(folder, trainer.model))

    _, again, machine = run_graph(whole, GoBack())
    assert [g.launches for g in machine.graphs] == [8, 4]
    np.testing.assert_allclose([losses(again)[k] for k in wanted], list(wanted.values()), rtol=1e-6)


def test_a_graph_does_not_wait(tmp_path, kernels):  # noqa: F811
    config = tiny_config(tmp_path, device="cuda", dropout=0.0, log_interval=10, max_iters=20, cuda_graph=True)
    trainer = tiny(config, Recorder())
    with pytest.MonkeyPatch.context() as patch:
        machine_for(patch, trainer.optimizer)
        waits = []
        for _ in range(9):
            with standin.counting() as found:
                trainer._train_step()
            waits.append(found)
    assert not any(waits[2:8]), waits


@pytest.mark.parametrize("changes, message", [
    (dict(device="cpu"), "device = cpu: must be cuda, or leave cuda_graph out"),
    (dict(dropout=0.1), "dropout = 0.1: must be 0"),
    (dict(dtype="float16"), "dtype = float16: must be float32 or bfloat16"),
    (dict(optimizer="muon"), "optimizer = muon: must be adamw"),
    (dict(init_from="base", lora_r=4, lora_dropout=0.1), "lora_dropout = 0.1: must be 0"),
], ids=lambda value: str(value)[:20])
def test_where_a_graph_cannot_be_used(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, **dict(device="cuda", dropout=0.0, cuda_graph=True) | changes)


def test_a_graph_is_not_for_examples(tmp_path, gpu):  # noqa: F811
    config = tiny_config(tmp_path, device="cuda", dropout=0.0)
    trainer = tiny(config, Recorder())
    config.cuda_graph = True
    examples = Examples.__new__(Examples)
    with pytest.raises(UserError, match="for batches of one length"):
        type(trainer)(trainer.model, config, SimpleNamespace(train=examples, val=examples))
