"""The training loop: what it computes, that a resumed run repeats the bits, and how it stops."""
import math
import signal

import numpy as np
import pytest
from tiny_run import losses, tiny_config, tiny_trainer

import tensorgrad as tg
from gpt.errors import UserError
from gpt.training import Callback, Checkpoints, EarlyStopping, Interrupted, MetricsFile, Samples, read_metrics
from gpt.training.checkpoints import load_last


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))


class Recorder(Callback):
    """Keeps all records; `at` = {iteration: function(trainer)} is called after a step."""

    def __init__(self, at=None):
        self.records, self.at = [], at or {}

    def on_step(self, trainer, record):
        self.records.append(record)
        self.at.get(trainer.iteration, lambda trainer: None)(trainer)

    def on_evaluation(self, trainer, record):
        self.records.append(record)

    def on_event(self, trainer, record):
        self.records.append(record)


def run(config, *callbacks):
    recorder = Recorder()
    trainer = tiny_trainer(config, [recorder, *callbacks])
    trainer.fit()
    return trainer, recorder.records


def weights(model):
    return {name: np.array(tensor.tolist()) for name, tensor in model.state_dict().items()}


def test_the_loss_falls_and_every_step_is_told(tmp_path):
    trainer, records = run(tiny_config(tmp_path, max_iters=60, eval_interval=20, dropout=0.0))
    steps = [r for r in records if "loss" in r]
    assert [r["iter"] for r in steps] == list(range(60))
    assert set(steps[0]) == {"iter", "loss", "lr", "grad_norm", "tokens_per_s"}
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["iter"] for r in evaluations] == [0, 20, 40, 60]
    vocabulary = trainer.dataset.tokenizer.vocab_size
    assert abs(evaluations[0]["val_loss"] - math.log(vocabulary)) < 0.1
    assert evaluations[-1]["val_loss"] < 0.8 * evaluations[0]["val_loss"]
    assert trainer.best_val_loss == min(r["val_loss"] for r in evaluations)


def test_learning_rate_is_nanogpts_cosine_with_warmup(tmp_path):
    config = tiny_config(tmp_path, max_iters=12, warmup_iters=3, learning_rate=1e-2, min_lr=1e-3, lr_decay_iters=10)
    _, records = run(config)

    def nanogpt(it):
        if it < 3:
            return 1e-2 * (it + 1) / 4
        if it > 10:
            return 1e-3
        return 1e-3 + 0.5 * (1 + math.cos(math.pi * (it - 3) / 7)) * 9e-3

    assert [r["lr"] for r in records if "loss" in r] == pytest.approx([nanogpt(it) for it in range(12)], rel=1e-12)


def test_two_half_batches_accumulated_are_one_batch(tmp_path):
    """The same sequences, as one batch of 8 and as two of 4: the same step."""
    config = tiny_config(tmp_path, dtype="float64", dropout=0.0, max_iters=1, batch_size=8)
    results = []
    for parts in (1, 2):
        config.batch_size, config.gradient_accumulation_steps = 8 // parts, parts
        trainer = tiny_trainer(config)
        trainer.batches = FixedBatches(trainer.dataset.train, 8 // parts, config.block_size)
        loss = trainer._accumulate_gradients().item()
        results.append((loss, [np.array(p.grad.tolist()) for p in trainer.model.parameters()]))
    (loss_1, grads_1), (loss_2, grads_2) = results
    assert loss_2 == pytest.approx(loss_1, rel=1e-12)
    for one, two in zip(grads_1, grads_2, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-14)


class FixedBatches:
    def __init__(self, tokens, rows, block):
        self.windows = (np.asarray(tokens[i * block : i * block + block + 1], np.int64) for i in range(99))
        self.rows = rows

    def next(self):
        batch = np.stack([next(self.windows) for _ in range(self.rows)])
        return batch[:, :-1], batch[:, 1:]


def test_gradients_are_clipped_to_grad_clip_and_the_norm_before_is_told(tmp_path):
    norms = []

    class Watch(Callback):
        def on_step(self, trainer, record):
            norms.append(record["grad_norm"])

    config = tiny_config(tmp_path, grad_clip=0.01, max_iters=3, optimizer="sgd", learning_rate=1.0, warmup_iters=0,
                         min_lr=1.0, weight_decay=0.0, beta1=0.0, eval_interval=100)
    trainer = tiny_trainer(config, [Watch()])
    before = weights(trainer.model)
    trainer._train_step()
    after = weights(trainer.model)
    names = [name for name in before if name != "lm_head.weight"]  # tied
    step = math.sqrt(sum(((after[name] - before[name]) ** 2).sum() for name in names))
    assert norms[0] > 0.1 and step == pytest.approx(0.01, rel=1e-3)  # SGD at rate 1 moves by the clipped gradient


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_resume_repeats_the_bits(tmp_path, optimizer):
    """A run of 12 steps, and one that stops after 7 and goes on in a new Trainer: the same losses and weights."""
    config = tiny_config(tmp_path, optimizer=optimizer, learning_rate=3e-3, gradient_accumulation_steps=2)
    whole, records = run(config)

    folder = tmp_path / "run"
    stop = Recorder({7: lambda trainer: trainer.stop("here")})
    first = tiny_trainer(config, [stop, Checkpoints(folder)])
    first.fit()
    assert first.iteration == 7

    second = tiny_trainer(config, [rest := Recorder()])
    tg.manual_seed(99)  # the state of the random numbers must come from the checkpoint
    second.load_state_dict(load_last(folder, second.model))
    second.fit()
    assert losses(stop.records) | losses(rest.records) == losses(records)
    evaluations = {r["iter"]: r["val_loss"] for r in stop.records + rest.records if "val_loss" in r}
    assert evaluations == {r["iter"]: r["val_loss"] for r in records if "val_loss" in r}
    for name, values in weights(whole.model).items():
        assert (weights(second.model)[name] == values).all(), name
    assert (second.best_val_loss, second.best_iteration) == (whole.best_val_loss, whole.best_iteration)


def test_evaluation_and_samples_do_not_change_the_training(tmp_path):
    _, plain = run(tiny_config(tmp_path, eval_interval=100))
    config = tiny_config(tmp_path, eval_interval=2, sample_interval=3, sample_tokens=5)
    _, watched = run(config, Samples(tmp_path / "samples.txt"))
    assert losses(watched) == losses(plain)
    assert (tmp_path / "samples.txt").read_text().count("--- iteration ") == 4


def test_the_same_seed_gives_the_same_run_and_another_a_different_one(tmp_path):
    runs = [losses(run(tiny_config(tmp_path, seed=seed))[1]) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_float64(tmp_path):
    trainer, _ = run(tiny_config(tmp_path, max_iters=2, dtype="float64"))
    assert {str(p.dtype) for p in trainer.model.parameters()} == {"float64"}


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    config = tiny_config(tmp_path, learning_rate=0.0, min_lr=0.0, max_iters=100, eval_interval=5)
    trainer, records = run(config, EarlyStopping(patience=3))
    assert trainer.iteration == 15  # evaluations at 0 (the best), 5, 10, 15
    assert [r["event"] for r in records if "event" in r] == ["stop"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    config = tiny_config(tmp_path, max_iters=20, eval_interval=4)

    def poison(trainer):
        with tg.no_grad():
            trainer.model.transformer.wte.weight.fill_(math.nan)

    recorder = Recorder({6: poison})
    folder = tmp_path / "run"
    trainer = tiny_trainer(config, [recorder, Checkpoints(folder)])
    with pytest.raises(UserError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert "the loss is nan at iteration 6, learning rate" in message and "checkpoint of iteration 4 is kept" in message
    assert "--learning_rate" in message and "\n" not in message
    assert recorder.records[-1]["event"] == "diverged"
    fresh = tiny_trainer(config)
    assert load_last(folder, fresh.model)["iteration"] == 4
    assert all(np.isfinite(values).all() for values in weights(fresh.model).values())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, eval_interval=100))
    trainer._accumulate_gradients()
    before = weights(trainer.model)
    trainer._accumulate_gradients = lambda: [p.grad.fill_(math.inf) for p in trainer.model.parameters()] and tg.ones(())
    with pytest.raises(UserError, match="the gradient norm is (inf|nan) at iteration 0"):
        trainer._train_step()
    assert all((weights(trainer.model)[name] == values).all() for name, values in before.items())


def test_text_shorter_than_a_block(tmp_path):
    config = tiny_config(tmp_path, val_fraction=0.001)
    with pytest.raises(UserError, match="the validation text is shorter than a block"):
        tiny_trainer(config)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    config = tiny_config(tmp_path, eval_interval=100)
    whole, records = run(config)
    folder = tmp_path / "run"
    press = Recorder({5: lambda trainer: signal.raise_signal(signal.SIGINT)})
    metrics = MetricsFile(folder / "metrics.jsonl")
    trainer = tiny_trainer(config, [metrics, press, Checkpoints(folder)])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="interrupted at iteration 5"):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [r["event"] for r in read_metrics(metrics.path) if "event" in r] == ["interrupt"]

    second = tiny_trainer(config, [MetricsFile(metrics.path)])
    second.load_state_dict(load_last(folder, second.model))
    second.fit()
    assert losses(read_metrics(metrics.path)) == losses(records)


def test_ctrl_c_in_an_evaluation_takes_effect_at_once_and_the_evaluation_is_repeated(tmp_path):
    config = tiny_config(tmp_path)
    _, records = run(config)
    folder = tmp_path / "run"
    trainer = tiny_trainer(config, [first := Recorder(), Checkpoints(folder)])
    windows = trainer.dataset.val

    class Pressing:  # the validation tokens, until somebody presses Ctrl-C while they are read
        def __len__(self):
            if trainer.iteration == 8 and not trainer._interrupted:
                signal.raise_signal(signal.SIGINT)
            return len(windows)

        def __array__(self, dtype=None, copy=None):
            return np.asarray(windows)

    object.__setattr__(trainer.dataset, "val", Pressing())
    with pytest.raises(Interrupted, match="iteration 8"):
        trainer.fit()
    second = tiny_trainer(config, [rest := Recorder()])
    second.load_state_dict(load_last(folder, second.model))
    assert (second.iteration, second.evaluated_at) == (8, 4)
    second.fit()
    assert losses(first.records) | losses(rest.records) == losses(records)
    assert [r["iter"] for r in rest.records if "val_loss" in r] == [8, 12]


def test_a_second_ctrl_c_does_not_wait_and_does_not_save(tmp_path):
    folder = tmp_path / "run"

    class Impatient(Callback):
        def on_step(self, trainer, record):
            if trainer.iteration == 6:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    trainer = tiny_trainer(tiny_config(tmp_path), [Impatient(), Checkpoints(folder)])
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit()
    assert not isinstance(caught.value, Interrupted)
    assert load_last(folder, tiny_trainer(tiny_config(tmp_path)).model)["iteration"] == 4
