"""What one sees of a run: a live line or plain lines, metrics.jsonl, samples, a loss curve."""
import json
import math
import sys
import time
from pathlib import Path

from .callbacks import Callback
from .files import append_text, complete_or_nothing


class MetricsFile(Callback):
    """Appends one JSON object per line to `path`, each line flushed at once.

    Keys: `iter` always; of a step, every `log_interval` of them, `loss`, `lr`, `grad_norm`, `tokens_per_s`; of an
    evaluation `val_loss`, `val_ppl`, `val_bpb`, `val_probability`; of an event `event`, `message`.
    A resumed run first drops the lines that lie after the point it resumes from, so that the file stays one curve.
    """

    def __init__(self, path):
        self.path = Path(path)

    def on_start(self, trainer):
        kept = []
        for record in read_metrics(self.path):
            done = record["iter"] < trainer.iteration
            if done or (record["iter"] == trainer.evaluated_at == trainer.iteration and "val_loss" in record):
                kept.append(json.dumps(record) + "\n")
        with complete_or_nothing(self.path, "the metrics") as new:
            new.write_text("".join(kept), encoding="utf-8")
        if trainer.iteration:
            trainer.event("resume", f"resumed at iteration {trainer.iteration}")

    def on_step(self, trainer, record):
        if record["iter"] % trainer.config.log_interval == 0:
            self.write(record)

    def on_evaluation(self, trainer, record):
        self.write(record)

    def on_event(self, trainer, record):
        self.write(record)

    def write(self, record):
        """Append a record, without the values that JSON does not know (inf, nan)."""
        record = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
        append_text(self.path, json.dumps(record) + "\n")


def read_metrics(path):
    """The records of a metrics.jsonl, in order; an unfinished last line, left by a crash, is skipped."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


class Console(Callback):
    """Progress for people: a live line on a terminal, a line every `log_interval` steps elsewhere.

    Evaluations, samples and events are always lines of their own.
    """

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = None

    def on_start(self, trainer):
        self.start_time, self.start_iteration = time.perf_counter(), trainer.iteration
        self.tokens_per_s = Average()
        if self.stream.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn

            console = RichConsole(file=self.stream, highlight=False, markup=False, emoji=False)
            text = TextColumn("{task.description}", markup=False)
            self.live = Progress(BarColumn(bar_width=20), text, transient=True, console=console)
            self.task = self.live.add_task("", total=trainer.config.max_iters, completed=trainer.iteration)
            self.live.start()

    def on_step(self, trainer, record):
        self.tokens_per_s.add(record["tokens_per_s"])
        if self.live:
            self.live.update(self.task, completed=trainer.iteration, description=self.describe(trainer, record))
        elif record["iter"] % trainer.config.log_interval == 0:
            self.print(self.describe(trainer, record))

    def describe(self, trainer, record):
        """The line of a step: iteration, loss, learning rate, speed, time left."""
        elapsed, done = time.perf_counter() - self.start_time, trainer.iteration - self.start_iteration
        left = elapsed / done * (trainer.config.max_iters - trainer.iteration)
        return (f"iter {record['iter']}/{trainer.config.max_iters}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
                f"{self.tokens_per_s.value:,.0f} tokens/s  {duration(left)} left")

    def on_evaluation(self, trainer, record):
        mark = "  best so far" if trainer.best_iteration == trainer.iteration else ""
        self.print(f"eval at {record['iter']}: val loss {record['val_loss']:.4f}  perplexity {record['val_ppl']:.2f}  "
                   f"bits per byte {record['val_bpb']:.3f}{mark}")

    def on_event(self, trainer, record):
        self.print(f"{record['event']}: {record['message']}")

    def on_sample(self, trainer, text):
        self.print(f"--- sample at {trainer.iteration}\n{text}\n---")

    def on_close(self, trainer):
        if self.live:
            self.live.stop()
            self.live = None

    def print(self, text):
        """Print lines above the live line."""
        if self.live:
            self.live.console.print(text, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)


class Average:
    """Exponential moving average that starts at its first value."""

    def __init__(self, weight=0.1):
        self.value, self.weight = None, weight

    def add(self, value):
        self.value = value if self.value is None else self.value + self.weight * (value - self.value)


def duration(seconds):
    """1:02:03 or 2:03, from seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class LossPlot(Callback):
    """Draws loss.png from metrics.jsonl at evaluations, at most every 30 seconds, and at the end.

    It needs matplotlib; without, it says so once.
    """

    def __init__(self, metrics_path, path):
        self.metrics_path, self.path = metrics_path, path
        self.drawn_at = -math.inf

    def on_start(self, trainer):
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            trainer.event("note", 'no loss.png without matplotlib: pip install -e ".[plot]"')
            self.drawn_at = math.inf

    def on_evaluation(self, trainer, record):
        if time.monotonic() > self.drawn_at + 30:
            self.draw()

    def on_stop(self, trainer):
        if self.drawn_at < math.inf:
            self.draw()

    def draw(self):
        plot_losses(read_metrics(self.metrics_path), self.path)
        self.drawn_at = time.monotonic()


def plot_losses(records, path):
    """Draw training and validation loss over iterations to an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
    styles = {"loss": {"label": "training", "linewidth": 0.8, "alpha": 0.7},
              "val_loss": {"label": "validation", "marker": "."}}
    for key, style in styles.items():
        points = [(record["iter"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
            axes.legend()
    axes.grid(alpha=0.3)
    with complete_or_nothing(path, "the loss curve") as new:
        figure.savefig(new, dpi=120, format="png")
