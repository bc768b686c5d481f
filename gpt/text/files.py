"""Where files are kept, how they are written so that no reader ever sees half of one, and how a folder is walked."""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import UserError


def cache_folder() -> Path:
    """The folder for what can be made again: ``$TENSORGRAD_CACHE``, or ``~/.cache/tensorgrad``."""
    return Path(os.environ.get("TENSORGRAD_CACHE") or "~/.cache/tensorgrad").expanduser()


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write a set of files: every one whole under a temporary name, fsynced, and only then renamed, in the given order.

    A full disk is met before the first rename, so the files that were there stay as they were.
    Raises UserError naming the file when the system refuses.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
            staged.append((temporary, path))
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in staged:
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
            " (what was there before is unchanged)"
        ) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def write_cache(path: Path, data: bytes) -> None:
    """Keep `data` for the next time; a cache that cannot be written costs time later and is no error now."""
    try:
        write_files({path: data})
    except UserError as error:
        warnings.warn(f"not cached: {error}", stacklevel=2)


def files_under(folder: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """All files under `folder`, sorted by name within each folder, links to folders not followed.

    `skip(name)` leaves out a file, or a folder with all it holds.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not skip(name))  # in place: os.walk goes on in this order
        paths = (Path(parent, name) for name in sorted(names) if not skip(name))
        yield from (path for path in paths if path.is_file())  # no pipes, no broken links
