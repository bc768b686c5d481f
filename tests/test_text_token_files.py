"""Token files: exact contents, dtypes, caching, checks on opening, and writing that never harms what is there."""

import errno
import json
import os
import zlib

import numpy as np
import pytest
from text_data import data_file, use_tiktoken_files

from gpt.errors import UserError
from gpt.text import CharTokenizer, Corpus, check_length, files, load_tokenizer, open_dataset, prepare, token_files

TEXT = "The quick brown fox jumps over the lazy dog — naïve, 你好.\n" * 20
NAMES = ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus():
    return Corpus(TEXT, "fox", "a fox")


@pytest.fixture
def folder(corpus, tmp_path):
    return prepare(corpus, "char", tmp_path / "data").folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def test_splits_decode_to_the_text(corpus, tmp_path):
    dataset = prepare(corpus, "char", tmp_path / "new" / "data", val_fraction=0.25)
    cut = int(len(TEXT) * 0.75)
    assert dataset.tokenizer.decode(dataset.train) == TEXT[:cut]
    assert dataset.tokenizer.decode(dataset.val) == TEXT[cut:]
    assert dataset.train.dtype == dataset.val.dtype == np.uint16
    assert isinstance(dataset.train, np.memmap) and not dataset.train.flags.writeable
    assert sorted(contents(dataset.folder)) == NAMES
    assert load_tokenizer(dataset.folder).fingerprint() == dataset.tokenizer.fingerprint()


def test_description(corpus, folder):
    meta = json.loads((folder / "meta.json").read_text())
    cut = int(len(TEXT) * 0.9)
    assert meta["text_sha256"] == corpus.sha256 and meta["text_bytes"] == len(TEXT.encode())
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("char", len(set(TEXT)), "uint16")
    assert meta["val_fraction"] == 0.1 and meta["text"] == "fox"
    for name, text in (("train", TEXT[:cut]), ("val", TEXT[cut:])):
        split = meta["splits"][name]
        assert (split["tokens"], split["bytes"]) == (len(text), len(text.encode()))
        assert (folder / f"{name}.bin").stat().st_size == 2 * len(text)


def test_tinyshakespeare_is_nanogpts(monkeypatch, tmp_path):
    path = data_file("tinyshakespeare.txt")
    dataset = prepare(path, "char", tmp_path / "data")
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    text = path.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}  # nanoGPT's recipe, in plain Python
    for name, part in (("train", text[:1_003_854]), ("val", text[1_003_854:])):
        assert contents(dataset.folder)[f"{name}.bin"] == np.array([ids[c] for c in part], dtype="<u2").tobytes()
    use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")
    dataset = prepare(path, "gpt2")
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)  # as nanoGPT's data/shakespeare/readme.md says


def test_cl100k_needs_uint32(monkeypatch, corpus, tmp_path):
    use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")
    dataset = prepare(corpus, "cl100k_base")
    assert dataset.train.dtype == np.uint32 and dataset.meta["dtype"] == "uint32"
    assert dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val) == TEXT
    rare = dataset.tokenizer.decode([100_000])  # an id that 16 bits cannot hold
    assert prepare(Corpus(rare, "rare", ""), "cl100k_base", val_fraction=0).train.tolist() == [100_000]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_dtype_boundary(vocab_size, dtype):
    assert token_files.token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_second_run_only_opens(monkeypatch, corpus, own_cache):
    first = prepare(corpus, "char")
    assert first.folder.parent == own_cache / "datasets" and first.folder.name.startswith("fox-char-")
    monkeypatch.setattr(token_files, "_write", lambda *args: pytest.fail("written again"))
    again = prepare(Corpus(TEXT, "fox", "the same text, described differently"), CharTokenizer.train(TEXT))
    assert again.folder == first.folder and (again.train == first.train).all()


def test_every_ingredient_has_its_own_folder(corpus):
    datasets = [
        prepare(corpus, "char"),
        prepare(corpus, "char", val_fraction=0.2),
        prepare(corpus, CharTokenizer.train(TEXT + "!")),
        prepare(Corpus(TEXT + "\n", "fox", ""), "char"),
    ]
    assert len({dataset.folder for dataset in datasets}) == 4


def test_a_given_folder_is_made_anew_for_another_text(folder):
    dataset = prepare(Corpus("ab" * 50, "ab", ""), "char", folder)
    assert dataset.tokenizer.decode(dataset.train) == "ab" * 45
    assert sorted(contents(folder)) == NAMES


def test_a_damaged_folder_is_made_anew(corpus, folder):
    whole = contents(folder)
    (folder / "val.bin").write_bytes(b"")
    prepare(corpus, "char", folder)
    assert contents(folder) == whole


def test_a_runs_tokenizer_is_not_overwritten(corpus, tmp_path):
    CharTokenizer.train("run").save(tmp_path)
    with pytest.raises(UserError, match="belongs to something else; choose another --out_dir"):
        prepare(corpus, "char", tmp_path)
    assert load_tokenizer(tmp_path).characters == "nru"


def test_no_validation_split(corpus):
    dataset = prepare(corpus, "char", val_fraction=0)
    assert len(dataset.train) == len(TEXT) and dataset.val.shape == (0,) and dataset.val.dtype == np.uint16


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_impossible_fraction(corpus, fraction):
    with pytest.raises(UserError, match="val_fraction is .*at least 0, below 1"):
        prepare(corpus, "char", val_fraction=fraction)


def test_folder_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="no prepared data in .*meta.json: No such file.*scripts/prepare.py"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"vocab_size": "many"}', "\xff"])
def test_damaged_description(folder, content):
    (folder / "meta.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="meta.json is damaged .*prepare it again"):
        open_dataset(folder)


def test_description_with_another_dtype(folder):
    for dtype in ("uint32", "int16", "float32"):
        edit(folder, dtype=dtype)
        with pytest.raises(UserError, match=f"meta.json says {dtype} for .* ids, not uint16"):
            open_dataset(folder)
    edit(folder, dtype="uint17")
    with pytest.raises(UserError, match="meta.json is damaged"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_truncated_file(folder, name):
    with open(folder / name, "r+b") as file:
        file.truncate(7)
    with pytest.raises(UserError, match=rf"{name} has 7 bytes, but \d+ tokens of uint16 are \d+: cut short"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
        open_dataset(folder)


def test_changed_file(folder):
    data = bytearray((folder / "train.bin").read_bytes())
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match="train.bin has changed since it was made"):
        open_dataset(folder)


def test_id_outside_the_vocabulary(folder):
    vocab_size = json.loads((folder / "meta.json").read_text())["vocab_size"]
    ids = np.array([0, vocab_size], "<u2")
    (folder / "val.bin").write_bytes(ids.tobytes())
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    edit(folder, splits=splits | {"val": {"tokens": 2, "bytes": 2, "crc32": zlib.crc32(ids)}})
    with pytest.raises(UserError, match=f"val.bin holds id {vocab_size}, but the vocabulary ends at {vocab_size - 1}"):
        open_dataset(folder)


def test_foreign_tokenizer(folder):
    characters = load_tokenizer(folder).characters
    CharTokenizer(characters[::-1]).save(folder)  # of the same size
    with pytest.raises(UserError, match="tokenizer.json is not the tokenizer of these tokens"):
        open_dataset(folder)


class FullDisk:
    """A disk on which the `fails_at`-th write is the one too many."""

    def __init__(self, fails_at):
        self.writes_left = fails_at

    def open(self, path, mode):
        file = open(path, mode)
        write = file.write

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(_, data):
                self.writes_left -= 1
                if self.writes_left == 0:
                    write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return File()


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_full_disk_leaves_the_old_files(monkeypatch, folder, fails_at):
    before = contents(folder)
    name = ["train.bin", "val.bin", "tokenizer.json", "meta.json"][fails_at - 1]
    monkeypatch.setattr(files, "open", FullDisk(fails_at).open, raising=False)
    with pytest.raises(UserError, match=f"cannot write .*{name}: No space left"):
        prepare(Corpus("ab" * 50, "ab", ""), "char", folder)
    assert contents(folder) == before
    assert open_dataset(folder).meta["text"] == "fox"


def test_nothing_is_renamed_before_it_is_safe_on_disk(monkeypatch, folder):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device; free space or choose another folder"):
        CharTokenizer.train("xyz").save(folder)
    assert contents(folder) == before


def test_the_description_comes_last(monkeypatch, corpus, tmp_path):
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(b.name), replace(a, b)))
    prepare(corpus, "char", tmp_path / "data")
    assert renamed == ["train.bin", "val.bin", "tokenizer.json", "meta.json"]


def test_a_file_where_the_folder_should_be(corpus, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="cannot write .*taken.*: "):
        prepare(corpus, "char", tmp_path / "taken")


def test_check_length():
    check_length(np.zeros(65), 64)
    with pytest.raises(UserError, match="val text is shorter than a block: it has 64 .* needs 65; .*--block_size 63"):
        check_length(np.zeros(64), 64, "val")
    with pytest.raises(UserError, match="shorter than a block: .* needs 2; give more text$"):
        check_length(np.zeros(1), 1)
