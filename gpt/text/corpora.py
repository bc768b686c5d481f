"""Text to train on: built-in corpora by name, and any file or folder by path."""

import difflib
import hashlib
import http.client
import os
import platform
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError
from .files import cache_folder, files_under, write_cache
from .pydocs import documentation

PYDOCS_FLOOR = 200_000  # bytes; less means that the documentation is not there, and a model would learn it by heart
PYDOCS_RECIPE = 1  # part of the cached file's name: raise it whenever pydocs.py would give another text

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"


@dataclass(frozen=True)
class Corpus:
    """A text and where it comes from. Lines end in \\n, whatever the file had."""

    text: str
    name: str
    description: str

    @cached_property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 bytes, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(data: str | Path = "pydocs") -> Corpus:
    """The corpus that `--data` names.

    "pydocs"       English prose from the documentation of Python and NumPy on this machine; no download
    "shakespeare"  tinyshakespeare, 1,115,394 characters; downloaded once, SHA-256 checked
    "pairs"        nine numbers in a fixed order, for a toy model
    a path         a UTF-8 text file, or a folder: its text files in sorted order with a blank line between them;
                   hidden files are left out, and files that are not text are counted in the description

    A built-in name wins over a file of that name: write ./shakespeare for the file.
    Raises UserError for what is missing, empty, or no UTF-8 text, and for a download that fails.
    """
    if str(data) in BUILT_IN:
        return BUILT_IN[str(data)]()
    path = Path(os.path.expanduser(data))
    if not str(data) or not os.path.exists(path):  # "" is no path to the folder we stand in
        near = difflib.get_close_matches(str(data), BUILT_IN, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no file or folder {str(data)!r}; {hint}Built-in corpora: {', '.join(BUILT_IN)}")
    if path.is_dir():
        return _folder(path)
    text = decode_text(_read(path), str(path))
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text, or --data pydocs")
    return Corpus(text, path.stem, f"the file {path.name}")


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, without byte order mark, line ends as \\n.

    Raises UserError naming `name` and the offset of a byte that is no text: a NUL, or invalid UTF-8.
    """
    text = ""
    try:
        text = data.decode("utf-8")
        bad = data.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        kind = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "no UTF-8 text"
        raise UserError(f"{name} is {kind}: byte 0x{data[bad]:02x} at offset {bad}; convert it to UTF-8 text first")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _folder(folder: Path) -> Corpus:
    texts: list[str] = []
    skipped: list[str] = []
    for path in files_under(folder, lambda name: name.startswith(".")):
        data = _read(path)
        try:
            text = decode_text(data, str(path)).strip("\n")
        except UserError:
            skipped.append(path.relative_to(folder).as_posix())
        else:
            texts += [text + "\n"] if text.strip() else []
    left_out = f"; {len(skipped)} left out as no UTF-8 text: {', '.join(skipped[:3])}" if skipped else ""
    left_out += ", ..." if len(skipped) > 3 else ""
    if not texts:
        raise UserError(f"no text in the folder {folder}{left_out}; give one that holds UTF-8 text files")
    return Corpus("\n".join(texts), folder.resolve().name, f"{len(texts)} text files under {folder}{left_out}")


def _read(path: Path) -> bytes:
    """The content, or only its start where a NUL in it already says that this is no text: weights may be gigabytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(8192)
            return start if b"\0" in start else start + file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _pydocs() -> Corpus:
    versions = f"py{platform.python_version()}-numpy{np.__version__}"
    cached = cache_folder() / f"pydocs{PYDOCS_RECIPE}-{versions}.txt"
    if cached.is_file():
        text = decode_text(_read(cached), str(cached))
    else:
        text = documentation()
        if len(text) < PYDOCS_FLOOR:
            raise UserError(
                f"this Python carries only {len(text):,} bytes of documentation (embedded editions leave it out);"
                " give a text file or folder with --data PATH, or --data shakespeare"
            )
        write_cache(cached, text.encode())
    about = f"English prose from the documentation of Python {platform.python_version()} and NumPy {np.__version__}"
    return Corpus(text, "pydocs", about)


def _shakespeare() -> Corpus:
    cached = cache_folder() / SHAKESPEARE_FILE
    places = [cached]
    if test_data := os.environ.get("TENSORGRAD_TEST_DATA"):
        places.append(Path(test_data) / SHAKESPEARE_FILE)
    data = next(filter(_is_shakespeare, (_read(place) for place in places if place.is_file())), None)
    if data is None:
        data = _download_shakespeare()
        write_cache(cached, data)
    text = decode_text(data, "shakespeare")
    return Corpus(text, "shakespeare", "tinyshakespeare, 40,000 lines from Shakespeare's plays")


def _is_shakespeare(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


def _download_shakespeare() -> bytes:
    remedy = "use --data pydocs, which needs no network, or --data PATH with a text file of your own"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download shakespeare from {SHAKESPEARE_URL} ({reason}); {remedy}") from error
    if not _is_shakespeare(data):
        raise UserError(f"{SHAKESPEARE_URL} gave another file than the expected one (SHA-256 differs); {remedy}")
    return data


def _pairs() -> Corpus:
    return Corpus("1 5 2 6 3 7 4 8 9\n" * 200, "pairs", "nine numbers again and again: 5 comes after 1, 2 after 5")


BUILT_IN = {"pydocs": _pydocs, "shakespeare": _shakespeare, "pairs": _pairs}
