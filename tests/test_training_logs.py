"""metrics.jsonl, the console, the loss curve."""
import io
import json
import sys

import pytest
from tiny_run import tiny_config, tiny_trainer

from gpt.training import Callback, Console, LossPlot, MetricsFile, read_metrics
from gpt.training.logs import duration, plot_losses


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))


def fit(config, *callbacks):
    trainer = tiny_trainer(config, callbacks)
    trainer.fit()
    return trainer


def test_metrics_are_one_object_per_line_flushed_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    seen = []

    class Watching(MetricsFile):
        def write(self, record):
            super().write(record)
            seen.append(len(path.read_text().splitlines()))  # another reader sees the line already

    fit(tiny_config(tmp_path, log_interval=3), Watching(path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert seen == list(range(1, len(records) + 1))
    assert [r["iter"] for r in records if "loss" in r] == [0, 3, 6, 9]
    assert [r["iter"] for r in records if "val_loss" in r] == [0, 4, 8, 12]
    assert set(records[0]) == {"iter", "val_loss", "val_ppl", "val_bpb", "val_probability"}
    assert set(records[1]) == {"iter", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert [r["iter"] for r in records] == sorted(r["iter"] for r in records)


@pytest.mark.parametrize("evaluated_at, kept", [(6, ["loss 0", "loss 5", "val 6"]), (3, ["loss 0", "loss 5"])])
def test_a_resumed_run_drops_what_lies_after_the_point_it_resumes_from(tmp_path, evaluated_at, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 0, "loss": 3.0}\n{"iter": 5, "loss": 2.0}\n{"iter": 6, "val_loss": 2.0}\n'
                    '{"iter": 6, "event": "note"}\n{"iter": 6, "loss": 1.9}\n{"iter": 7, "loss": 1.8}\n{"iter": 8, "lo')
    trainer = tiny_trainer(tiny_config(tmp_path))
    trainer.iteration, trainer.evaluated_at = 6, evaluated_at
    metrics = MetricsFile(path)
    trainer.callbacks = [metrics]
    metrics.on_start(trainer)
    records = read_metrics(path)
    names = [f"{'val' if 'val_loss' in r else 'loss'} {r['iter']}" for r in records[:-1]]
    assert names == kept and records[-1] == {"iter": 6, "event": "resume", "message": "resumed at iteration 6"}


def test_a_new_run_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 0, "loss": 3.0}\n')
    metrics = MetricsFile(path)
    metrics.on_start(tiny_trainer(tiny_config(tmp_path)))
    assert path.read_text() == ""


def test_what_json_cannot_hold_is_left_out(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"iter": 1, "val_loss": 800.0, "val_ppl": float("inf")})
    assert metrics.path.read_text() == '{"iter": 1, "val_loss": 800.0}\n'


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    fit(tiny_config(tmp_path, log_interval=5), Console(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("iter ")] == ["0/12", "5/12", "10/12"]
    assert all(part in lines[1] for part in ("loss ", "lr ", "tokens/s", " left"))
    assert [line.split(":")[0] for line in lines if line.startswith("eval")] == [f"eval at {i}" for i in (0, 4, 8, 12)]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_live_line_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True

    class Marked(Callback):  # rich must show a text as it is
        def on_stop(self, trainer):
            trainer.emit("on_sample", "[b]:smile:[/b]")

    fit(tiny_config(tmp_path), Console(stream), Marked())
    assert "[b]:smile:[/b]" in stream.getvalue()
    text = stream.getvalue()
    assert 0 <= text.index("\x1b[?25l") < text.index("\x1b[?25h")  # the cursor is hidden, and shown again
    assert "eval at 12: val loss" in text and "iter 11/12  loss" in text


def test_the_terminal_is_restored_when_training_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    trainer = tiny_trainer(tiny_config(tmp_path), [Console(stream)])
    trainer._accumulate_gradients = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert "\x1b[?25h" in stream.getvalue()


def test_the_loss_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    fit(tiny_config(tmp_path), metrics, LossPlot(metrics.path, tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.new"))


def test_the_loss_curve_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    plot_losses([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_without_matplotlib_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    fit(tiny_config(tmp_path), metrics, LossPlot(metrics.path, tmp_path / "loss.png"))
    notes = [r["message"] for r in read_metrics(metrics.path) if r.get("event") == "note"]
    assert len(notes) == 1 and "[plot]" in notes[0]
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text
