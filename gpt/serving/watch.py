"""A training run while it goes on: what its folder has to tell since one last asked."""
import json
import os
import re
import time
import zlib
from pathlib import Path

from ..errors import UserError
from ..training.checkpoints import CONFIG, METRICS
from ..training.config import read_run, run_folder

MAX_CHUNK = 2**20       # bytes of metrics in one answer
MAX_SAMPLES = 10


def watched(config):
    """The run folder that a ServeConfig names, or None: run_dir, else init_from where that is a run's."""
    if config.run_dir:
        return run_folder(config.run_dir)
    folder = run_folder(config.init_from)
    return folder if (folder / METRICS).is_file() else None


def run_since(folder, mark=""):
    """What a run has written since `mark`, an earlier answer's, "" for all: {"mark", "reset", "more", "records",
    "samples", "max_iters", "age"}.

    With `reset` the client forgets what it had: the file is another one, of a run that was resumed or begun anew.
    `more`: ask again at once. `samples`: the last MAX_SAMPLES, [{"iter", "text"}], or None where none is new.
    `age`: seconds since the metrics were written, None where there are none."""
    wanted = re.fullmatch(r"(\d{1,18})-(\d{1,18})-(\d{1,18})", mark)
    known, offset, sampled = map(int, wanted.groups()) if wanted else (0, 0, 0)
    chunk, size, found, age = b"", 0, 0, None
    try:
        with open(folder / METRICS, "rb") as file:
            size, found, age = _identity(file)
            reset = known != found or offset > size
            offset = 0 if reset else offset
            file.seek(offset)
            chunk = file.read(MAX_CHUNK)
            chunk = chunk[:chunk.rfind(b"\n") + 1]                             # a line that is being written waits
    except FileNotFoundError:                                                  # a run that has not begun
        reset, offset = bool(known), 0
    samples, sampled = _samples(folder / "samples.txt", -1 if reset else sampled)
    offset += len(chunk)
    return {"mark": f"{found}-{offset}-{sampled}", "reset": reset, "more": bool(chunk) and offset < size,
            "records": list(_records(chunk)), "samples": samples, "max_iters": _max_iters(folder), "age": age}


def _identity(file):
    """Size of an open file, a number that another file in its place would not have, and its age in seconds."""
    status, first = os.fstat(file.fileno()), file.readline()
    return status.st_size, zlib.crc32(first, status.st_ino % 2**32) or 1, max(0.0, time.time() - status.st_mtime)


def _records(chunk):
    for line in chunk.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # left by a crash
            continue


def _samples(path, known):
    """(the last samples or None, size) of samples.txt, where its size is not `known`."""
    try:
        size = path.stat().st_size
        if size == known:
            return None, size
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ([] if known > 0 else None), 0
    parts = re.split(r"^--- iteration (\d+)\n", text, flags=re.MULTILINE)
    samples = [{"iter": int(i), "text": text} for i, text in zip(parts[1::2], parts[2::2], strict=True)]
    return samples[-MAX_SAMPLES:], size


def _max_iters(folder):
    try:
        return read_run(folder).get("max_iters") if (Path(folder) / CONFIG).is_file() else None
    except UserError:
        return None
