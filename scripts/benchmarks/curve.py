"""The loss curve: the same weights, batches and schedule in both libraries, over many steps, with dropout of their own.

How far two runs of one library with different dropout masks lie apart is the noise that a difference between the
libraries is to be compared with; so ours runs twice."""
import math
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np

from .runner import WrongInput, contenders, print_table, progress, work
from .sizes import SIZES
from .train import build

WINDOW = 25  # steps that are averaged for a row of the table
EVALUATIONS = 10  # batches of the validation part


def report(options):
    """Train every contender in turn and print the curves side by side; the results as (rows, skipped)."""
    if options.data is None or not options.data.is_file():
        raise WrongInput("give a text file with --data, such as tinyshakespeare")
    rows, skipped = [], {}
    for size in options.size:
        chosen, missing = contenders(options)
        skipped |= missing
        runs = {}
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.npz"
            for contender in chosen:
                for seed in (1, 2) if contender.mode == "ours" else (1,):
                    name = f"{contender.name}, masks {seed}"
                    progress(f"{name}: {options.steps} steps of {size}")
                    runs[name] = work(contender, "curve", options.threads, size=size, steps=options.steps, seed=seed,
                                      dropout=options.dropout, data=str(options.data.resolve()), weights=str(weights))
        rows += [{"size": size, "contender": name, **run} for name, run in runs.items()]
        _print(size, runs)
    return rows, skipped


def _print(size, runs):
    steps = len(next(iter(runs.values()))["losses"])
    print_table([f"loss at {size}", *runs],
                [[f"{i + 1} to {min(i + WINDOW, steps)}", *(f"{mean(run['losses'][i:i + WINDOW]):.4f}"
                                                             for run in runs.values())]
                 for i in range(0, steps, WINDOW)]
                + [["validation", *(f"{run['val_loss']:.4f}" for run in runs.values())],
                   ["seconds", *(f"{run['seconds']:.0f}" for run in runs.values())]])


# ---- in the measuring process ----------------------------------------------------------------------------------------


def measure(spec):
    """Losses of `steps` steps, the validation loss after them, and the seconds that the steps took."""
    size = SIZES[spec["size"]]
    dropout = size.dropout if spec["dropout"] is None else spec["dropout"]
    library, model, context = build(spec, size, dropout)
    _same_weights(library, model, Path(spec["weights"]))
    library.manual_seed(spec["seed"])
    train, val = _tokens(spec["data"], size.vocab)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99))
    parameters, rng = list(model.parameters()), np.random.default_rng(0)

    def batch(tokens):
        starts = rng.integers(0, len(tokens) - size.block - 1, size.batch)
        window = tokens[starts[:, None] + np.arange(size.block + 1)]           # (B, T + 1)
        return (library.from_numpy(np.ascontiguousarray(part)) for part in (window[:, :-1], window[:, 1:]))

    losses, started = [], time.perf_counter()
    for i in range(spec["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = _rate(i)
        with context:
            _, loss = model(*batch(train))
        optimizer.zero_grad()
        loss.backward()
        library.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    model.eval()
    with library.no_grad():
        val_loss = mean(model(*batch(val))[1].item() for _ in range(EVALUATIONS))
    return {"losses": losses, "val_loss": val_loss, "seconds": seconds}


def _rate(i):
    """The learning rate of step i = 0, 1, ...: nanoGPT's schedule of shakespeare_char."""
    return 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (i - 100) / 4900))


def _same_weights(library, model, path):
    """The first process writes its weights to `path`, the others take them over."""
    own = dict(model.named_parameters())
    if path.exists():
        with np.load(path) as stored, library.no_grad():
            for name, p in own.items():
                p.copy_(library.from_numpy(stored[name]))
    else:
        np.savez(path, **{name: p.detach().numpy() for name, p in own.items()})


def _tokens(path, vocab):
    """(training, validation) ids of the characters of a text: its first nine tenths and the rest."""
    text = Path(path).read_text(encoding="utf-8")
    characters = sorted(set(text))
    if len(characters) > vocab:
        raise ValueError(f"the text has {len(characters)} different characters, the model {vocab}")
    number = {c: i for i, c in enumerate(characters)}
    ids = np.array([number[c] for c in text], dtype=np.int64)
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
