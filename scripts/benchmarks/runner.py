"""Measuring in processes of their own: who takes part, turn by turn, on which machine, and how it is printed.

Every measurement is a fresh process (`bench.py --worker SPEC`), so that no library's threads, allocator or caches touch
another's. The processes of all contenders take turns within a round, and ratios are taken within a round: what the
machine does meanwhile then meets all alike.
"""
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench.py"
LEVELS = ("fast", "numba", "numpy", "reference", "composed")
PEERS = {"eager": "torch eager", "compile": "torch.compile", "bf16": "torch bf16"}


class BenchError(Exception):
    """A measurement of ours that failed; one line."""


class WrongInput(BenchError):
    """A wish that cannot be met; one line."""


@dataclass(frozen=True)
class Contender:
    """A library in one of its forms. `mode`: "ours" or a key of PEERS; `root`: the folder that holds tensorgrad."""

    name: str
    mode: str = "ours"
    level: str = "fast"
    dtype: str = "float32"
    root: str = str(ROOT)
    required: bool = False


def contenders(options):
    """Who takes part: (list of Contenders, {name: why it does not})."""
    chosen = [Contender(f"ours {level}" + ("" if dtype == "float32" else f" {dtype}"), level=level, dtype=dtype,
                        required=True)
              for level in options.level for dtype in getattr(options, "dtype", ["float32"])]
    if options.against_root:
        chosen += [Contender(f"{options.against} {level}", level=level, root=options.against_root)
                   for level in options.level]
    skipped = {}
    for peer in options.peers:
        if peer == "none":
            continue
        if importlib.util.find_spec("torch") is None:
            skipped[PEERS[peer]] = "torch is not installed"
        else:
            chosen.append(Contender(PEERS[peer], mode=peer))
    return chosen, skipped


def environment(threads, level="fast", root=None):
    """The variables of a measured process: `threads` for every library, the level of our routines."""
    names = ("TENSORGRAD_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    changes = {**dict.fromkeys(names, str(threads)), "TENSORGRAD_LEVEL": level}
    if root is not None:
        changes["PYTHONPATH"] = root
    # as on a user's machine, bytecode is kept: where it may not be written, importing compiles everything anew
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}, **changes}


def work(contender, job, threads, limit=None, **spec):
    """The result of one measuring process, a dict; {"skipped": reason} where it could not run, or not within `limit`
    seconds.

    Raises BenchError where the contender is required."""
    spec = {**spec, "job": job, "mode": contender.mode, "dtype": contender.dtype, "root": contender.root,
            "threads": threads}
    command = [sys.executable, str(SCRIPT), "--worker", json.dumps(spec)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:  # pipes its own children could hold
        try:
            done = subprocess.run(command, stdout=out, stderr=said, env=environment(threads, contender.level),
                                  timeout=limit)
            reason = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            done, reason = None, f"took more than {limit} s"
        out.seek(0), said.seek(0)
        results, errors = out.read().strip().splitlines(), said.read().strip().splitlines()
    if done and done.returncode == 0:
        return json.loads(results[-1])
    if done and errors:
        reason = errors[-1]
    if contender.required:
        raise BenchError(f"{contender.name}: {job} failed: {reason}")
    return {"skipped": reason}


def take_turns(chosen, job, options, skipped, **spec):
    """{contender: its results, one per round}, processes alternating, the order reversed in every other round.

    Who fails is moved to `skipped` with the reason."""
    results = {contender: [] for contender in chosen}
    for turn in range(options.rounds):
        for contender in list(results)[:: -1 if turn % 2 else 1]:
            progress(f"round {turn + 1}/{options.rounds}: {contender.name} {job} {spec.get('size', '')}")
            result = work(contender, job, options.threads, getattr(options, "limit", None), **spec)
            if "skipped" in result:
                skipped[contender.name] = result["skipped"]
                del results[contender]
            else:
                results[contender].append(result)
    return results


def times_faster(results, contender, key):
    """The median over rounds of torch eager's `key` divided by the contender's; None without torch."""
    return _ratio(results, contender, key, lambda other: other.mode == "eager")


def times_before(results, contender, key):
    """The same ratio for the revision of --against at the same level; None without, or where that is the contender."""
    if contender.root != str(ROOT) or contender.mode != "ours":
        return None
    return _ratio(results, contender, key, lambda other: (other.level == contender.level and other.mode == "ours"
                                                          and other.root != contender.root))


def _ratio(results, contender, key, is_base):
    base = next((rows for other, rows in results.items() if is_base(other)), None)
    return base and median(b[key] / own[key] for b, own in zip(base, results[contender], strict=True))


def middle(rows, key):
    """The median of `key` over the rounds."""
    return median(row[key] for row in rows)


def thread_count():
    """TENSORGRAD_THREADS, else the number of processors this process may use."""
    given = os.environ.get("TENSORGRAD_THREADS", "")
    if given:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads):
    """What the figures were measured on."""
    versions = {}
    for name in ("numpy", "numba", "mkl", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "system": platform.system(),
            "python": platform.python_version(), "versions": versions, "revision": _revision(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}


def _cpu():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _revision():
    try:
        found = _git("describe", "--always", "--dirty")
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None


@contextmanager
def checked_out(revision):
    """The path of a temporary git worktree of `revision`; None for None."""
    if revision is None:
        yield None
        return
    if _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").returncode:
        raise WrongInput(f"--against {revision}: git knows no such revision here")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tree")
        added = _git("worktree", "add", "--detach", path, revision)
        if added.returncode:
            raise WrongInput(f"--against {revision}: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", path)


def progress(line):
    print(line, file=sys.stderr, flush=True)


def print_table(head, rows):
    """Rows of strings and numbers under `head`, the first column to the left, the others to the right; None is -."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w)
                          for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join([first, *others]).rstrip())
    print(flush=True)


def _cell(value):
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"
