"""scripts/prepare.py: what it prints, what it writes, and its exit codes."""

import runpy
import subprocess
import sys

import pytest
from text_data import REPOSITORY

import gpt.text
from gpt.text import open_dataset

SCRIPT = REPOSITORY / "scripts" / "prepare.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the script as a user does, from another folder and without the project on the path."""
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "book.txt").write_text("once upon a time\n" * 40)

    def run(*arguments):
        command = [sys.executable, SCRIPT, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize("flag", ["--out_dir", "--out-dir"])
def test_prepares_a_folder(run, tmp_path, flag):
    done = run("--data", "book.txt", flag, "tokens", "--val_fraction", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    dataset = open_dataset(tmp_path / "tokens")
    assert len(dataset.train) == len(dataset.val) == 340
    assert f"680 bytes, sha256 {dataset.meta['text_sha256']}\n" in done.stdout
    assert "\ntrain      340 tokens, 1.000 bytes per token\n" in done.stdout
    assert done.stdout.endswith("folder     tokens\n")
    assert run("--data", "book.txt", flag, "tokens", "--val_fraction", "0.5").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "buch.txt"], "error: no file or folder 'buch.txt'"),
        (["--data", "book.txt", "--tokenizer", "chars"], "error: no tokenizer 'chars'; did you mean char?"),
        (["--data", "book.txt", "--val_fraction", "1"], "error: val_fraction is 1.0"),
    ],
)
def test_user_errors_are_one_line(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_unknown_flag(run):
    done = run("--tokeniser", "char")
    assert done.returncode == 2 and "--tokenizer" in done.stdout + done.stderr


def test_interrupt(monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt.text, "load_text", interrupt)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 130
