"""A corpus that is already on the disk: the English prose in the documentation of Python and NumPy.

Sources: the language reference that `help()` shows (`pydoc_data.topics`), and the docstrings of the standard library
and of NumPy, read from source with `ast`, so that no module is imported and `python -OO` changes nothing. What an
installation lacks (an embedded Python has no source) is left out. About 1.6 MB, 96 different characters, 3 seconds; the
text differs between versions of Python and NumPy, so its size and SHA-256 belong beside any loss measured on it.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import files_under

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BREAK = re.compile(r"(?m)\n\s*\n|^.*\n[ \t]*(?:-{3,}|={3,}|~{3,})[ \t]*$")  # a blank line, or an underlined heading
PLAIN_WORD = re.compile(r"""[("'*]*[A-Za-z]+(['-][A-Za-z]+)*["')*]*[.,;:?!]*["')*]*""")


def documentation() -> str:
    """All prose paragraphs, each once and on one line, separated by blank lines.

    Documents (a topic, a module) come in the order of a hash of their names: the same on every machine, and so mixed
    that the last tenth, the validation split, is drawn from all sources.
    """
    documents = sorted(_documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    paragraphs = (" ".join(paragraph.split()) for _, text in documents for paragraph in BREAK.split(text))
    return "\n\n".join(dict.fromkeys(filter(is_prose, paragraphs))) + "\n"


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph, its whitespace collapsed, reads as English: printable ASCII, a capital at its start, a stop
    at its end, and at least 8 words of which 80 % are plain."""
    words = paragraph.split(" ")
    return (
        len(words) >= 8
        and paragraph.isascii()
        and paragraph.isprintable()
        and paragraph[0].isupper()
        and paragraph[-1] in ".:?!"
        and sum(PLAIN_WORD.fullmatch(word) is not None for word in words) >= 0.8 * len(words)
    )


def _documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every document."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name, text in topics.items():
        yield f"topics/{name}", text
    for library, root in (("python", sysconfig.get_path("stdlib")), ("numpy", Path(np.__file__).parent)):
        for path in files_under(Path(root), SKIPPED_FOLDERS.__contains__):
            if path.suffix == ".py":
                yield f"{library}/{path.relative_to(root).as_posix()}", "\n\n".join(_docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    """Every docstring in a source file, and every string given to NumPy's add_newdoc functions."""
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's source are not our user's concern
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates and samples of bad syntax are no modules
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("add_newdoc"):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value
