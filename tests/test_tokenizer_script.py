"""scripts/train_tokenizer.py: what it prints, what it writes, its exit codes, and training with the result."""

import subprocess
import sys

import pytest
from text_data import REPOSITORY

from gpt.errors import UserError
from gpt.text import load_tokenizer, prepare
from gpt.text.tokenizers.training import TokenizerConfig, train_tokenizer


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the script as a user does, from another folder and without the project on the path."""
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "book.txt").write_text("Once upon a time, there was a word; its letters are all that it had.\n" * 40)

    def run(*arguments):
        command = [sys.executable, REPOSITORY / "scripts" / "train_tokenizer.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


def test_trains_measures_and_saves(run, tmp_path):
    done = run("--data", "book.txt", "--vocab-size", "280", "--out_dir", "t")
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 280 and tokenizer.eot_id == 279
    held_out = (tmp_path / "book.txt").read_text()[-276:]
    tokens = len(tokenizer.encode(held_out))
    assert f"\nheld out   {tokens} tokens, {276 / tokens:.3f} bytes per token\n" in done.stdout
    assert "tokenizer  bpe, 280 ids, trained in " in done.stdout and done.stdout.endswith("folder     t\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "buch.txt"], "error: no file or folder 'buch.txt'"),
        (["--vocab", "3"], "error: unknown flag --vocab; did you mean --vocab_size?"),
        (["book.txt"], "error: unexpected argument 'book.txt'; a text is given as --data 'book.txt'"),
        (["--kind", "bytes"], "error: --kind must be one of bpe, word, char"),
        (["--data", "book.txt", "--vocab_size", "100"], "error: a BPE vocabulary of 100 ids is too small"),
    ],
)
def test_user_errors_are_one_line(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_kinds(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("once upon a time\n" * 40 + "zebras!\n")
    lines = []
    common = {"data": str(book), "out_dir": str(tmp_path / "t")}
    char = train_tokenizer(TokenizerConfig(kind="char", **common), lines.append)
    assert char.vocab_size == len(set(book.read_text())) and "held out   69 tokens, 1.000 bytes per token" in lines
    word = train_tokenizer(TokenizerConfig(kind="word", vocab_size=50, clean=False, **common), lines.append)
    assert sorted(word.words) == ["\n", "a", "once", "time", "upon"]
    assert "           the text offers no more than these, 50 were asked for" in lines
    assert any(line.startswith("held out   22 tokens") and line.endswith(" unknown") for line in lines)
    bpe = train_tokenizer(TokenizerConfig(special_tokens="<a>, <b>", pattern="cl100k", **common), lines.append)
    assert list(bpe.special_tokens) == ["<a>", "<b>"]
    with pytest.raises(UserError, match="val_fraction is 1"):
        TokenizerConfig(val_fraction=1)


@pytest.mark.parametrize("name", ["bpe:300", "word:20"])
def test_a_prepared_data_set_carries_it(tmp_path, name):
    book = tmp_path / "book.txt"
    book.write_text("once upon a time\n" * 40)
    dataset = prepare(str(book), name, tmp_path / "tokens")
    assert dataset.meta["vocab_size"] == dataset.tokenizer.vocab_size <= 300
    assert prepare(str(book), name, tmp_path / "tokens").tokenizer.fingerprint() == dataset.tokenizer.fingerprint()
    assert "once upon a time" in dataset.tokenizer.decode(dataset.train)
