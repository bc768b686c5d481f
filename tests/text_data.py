"""Where the text tests find data that is no part of the repository."""

import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
_ENVIRONMENT = os.environ.get("TENSORGRAD_TEST_DATA")  # read here, as some tests unset it
FOLDERS = [*filter(None, [_ENVIRONMENT]), REPOSITORY.parent / "shared" / "data"]


def data_file(name: str) -> Path:
    """The test data called `name`, from $TENSORGRAD_TEST_DATA or ../shared/data; skips the test where there is none."""
    for folder in map(Path, FOLDERS):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"needs {name} in $TENSORGRAD_TEST_DATA or ../shared/data")


def use_tiktoken_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let tiktoken find its vocabularies, and those in its cache, in a copy: it deletes files that seem damaged."""
    folder.mkdir()
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or folder)
    for file in [*data_file("tiktoken").iterdir(), *(cache.iterdir() if cache.is_dir() else ())]:
        shutil.copyfile(file, folder / file.name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
