"""Writing so that a crash or a full disk leaves what was there before."""
import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def complete_or_nothing(target, what):
    """Yields the path `target` + ".new" to write a file or a folder of files to; afterwards that is flushed to the disk
    and renamed to `target`. If anything fails it is deleted, and `target` stays as it was. A full disk becomes a
    UserError that says `what` could not be written."""
    target = Path(target)
    new = target.with_name(target.name + ".new")
    delete(new)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        for path in [*new.iterdir(), new] if new.is_dir() else [new]:
            flush(path)
        put_in_place(new, target)
    except BaseException as error:
        delete(new)
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise UserError(f"{what} could not be written to {target}: {error.strerror}; free some space and go on "
                            "(what was saved before is unharmed)") from error
        raise


def put_in_place(new, target):
    """Rename `new` to `target`. A folder cannot be renamed over another one: the one that is there steps aside to
    `target` + ".old", where it is to be found if a crash comes between the two renames."""
    old = target.with_name(target.name + ".old")
    if target.is_dir():
        delete(old)
        os.rename(target, old)
    os.replace(new, target)
    flush(target.parent)
    if target.is_dir():
        delete(old)


def append_text(path, text):
    """Append to a text file; when this returns, others can read it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failing write does not name its file


def flush(path):
    """Wait until a file or folder is on the disk. Folders can be opened for this on POSIX systems only."""
    if os.name == "posix" or path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete(path):
    """Delete a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
