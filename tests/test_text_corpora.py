"""Corpora: what each name and path gives, the pydocs recipe, the cache, and every error message."""

import email.message
import hashlib
import io
import urllib.error
import urllib.request

import pytest
from text_data import data_file

from gpt.errors import UserError
from gpt.text import corpora, load_text, pydocs

SHAKESPEARE_MD5 = "6fb458f1232090904fb40fe944165e91"  # as published with nanoGPT's numbers


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORGRAD_TEST_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)


@pytest.fixture(scope="module")
def documents():
    return list(pydocs._documents())  # takes seconds, so once for all


@pytest.fixture(scope="module")
def documentation(documents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydocs, "_documents", lambda: iter(documents))
        return pydocs.documentation()


def test_file(tmp_path):
    (tmp_path / "book.txt").write_bytes("\ufeffone\r\ntwo\rthree é\n".encode())
    corpus = load_text(tmp_path / "book.txt")
    assert corpus.text == "one\ntwo\nthree é\n"
    assert (corpus.name, corpus.size) == ("book", 17)
    assert corpus.sha256 == hashlib.sha256("one\ntwo\nthree é\n".encode()).hexdigest()


def test_folder(tmp_path):
    folder = tmp_path / "notes"
    for name, content in {
        "b.md": b"# b\n",
        "a/z.txt": b"\n\nz\n\n",
        "a/c.py": b"c = 1",
        "weights.bin": b"\0\1" + b"x" * 9000,
        "latin.txt": b"caf\xe9",
        "empty.txt": b" \n",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    corpus = load_text(str(folder))
    assert corpus.text == "# b\n\nc = 1\n\nz\n"
    assert corpus.name == "notes"
    assert corpus.description == f"3 text files under {folder}; 2 left out as no UTF-8 text: latin.txt, weights.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", "is no UTF-8 text: byte 0x00 at offset 3"),
        (b"x" * 10_000 + b"\0", "is no UTF-8 text: byte 0x00 at offset 10000"),
        (b"\xef\xbb\xbfcaf\xe9 au lait", "is no UTF-8 text: byte 0xe9 at offset 6"),
        ("hello".encode("utf-16"), "is UTF-16 text: byte 0xff at offset 0"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_text(file)
    assert str(error.value).startswith(f"{file} {message}")


def test_folder_without_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match="no text in the folder .*; 1 left out as no UTF-8 text: image.png"):
        load_text(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("secret")
    monkeypatch.setattr(corpora, "open", refuse, raising=False)
    for data in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="cannot read .*a.txt: Permission denied"):
            load_text(data)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("shakespear", "did you mean shakespeare"),
        ("pydoc", "did you mean pydocs"),
        ("", "Built-in"),
        ("x" * 5000, "Built-in"),
    ],
)
def test_missing(data, hint):
    with pytest.raises(UserError, match=f"no file or folder '{data}'; .*{hint}.*pydocs, shakespeare"):
        load_text(data)


def test_pydocs_is_clean_prose(documentation):
    assert documentation.isascii() and len(documentation) > 200_000
    paragraphs = documentation.rstrip("\n").split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 1000
    assert all(pydocs.is_prose(paragraph) for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("paragraph", "prose"),
    [
        ("Return the number of items that are in the list.", True),
        ("Return the *number* of items (or None) that `x` has.", True),
        ("Too short to be prose here.", False),
        ("return the number of items that are in the list.", False),
        ("Return the number of items that are in the list", False),
        ("Return the number of ïtems that are in the list.", False),
        ("Call f(x=1) + g[2] with a_b, c_d, 0x1F and 3.14.", False),
    ],
)
def test_prose_filter(paragraph, prose):
    assert pydocs.is_prose(paragraph) is prose


def test_pydocs_joins_lines_drops_headings_and_repetitions(monkeypatch):
    first = "Return the number of items\n    that are in the list."
    second = "Returns\n  -------\n  The  second one of the\n  two items in it."
    text = f"lower case\n\n{first}\n\nNotes\n-----\n{first}\n  \n{second}"
    monkeypatch.setattr(pydocs, "_documents", lambda: iter([("x", text)]))
    assert pydocs.documentation() == (
        "Return the number of items that are in the list.\n\nThe second one of the two items in it.\n"
    )


def test_pydocs_does_not_depend_on_the_order_of_the_disk(monkeypatch, documents, documentation):
    assert {name.split("/")[0] for name, _ in documents} == {"topics", "python", "numpy"}
    monkeypatch.setattr(pydocs, "_documents", lambda: reversed(documents))
    assert pydocs.documentation() == documentation


def test_pydocs_mixes_its_sources(monkeypatch):
    names = [f"{library}/{i}" for library in ("numpy", "python", "topics") for i in range(100)]
    texts = [f"This is the one sentence of document {name} here." for name in names]
    monkeypatch.setattr(pydocs, "_documents", lambda: zip(names, texts, strict=True))
    tail = pydocs.documentation().split("\n\n")[270:]  # what would become the validation split
    assert all(any(library in sentence for sentence in tail) for library in ("numpy", "python", "topics"))


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""Module."""\nraise SystemExit\nclass C:\n    "Class."\n    async def f(self):\n        "\\w Method."\n'
        'add_newdoc("numpy", "ndarray", ("shape", """Shape."""))\nx = "no docstring"\n'
    )
    strings = list(pydocs._docstrings(tmp_path / "m.py"))
    assert {"Module.", "Class.", "\\w Method.", "Shape."} <= set(strings) and "no docstring" not in strings
    (tmp_path / "bad.py").write_text("def (:")
    assert list(pydocs._docstrings(tmp_path / "bad.py")) == []


def test_pydocs_is_cached(monkeypatch, own_cache, documentation):
    monkeypatch.setattr(corpora, "documentation", lambda: documentation)
    first = load_text()
    assert first.text == documentation
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(corpora, "documentation", lambda: pytest.fail("built again"))
    assert load_text("pydocs") == first


def test_pydocs_floor(monkeypatch, own_cache):
    monkeypatch.setattr(corpora, "documentation", lambda: "Too little.\n" * 100)
    with pytest.raises(UserError, match="only 1,200 bytes of documentation .*--data PATH"):
        load_text("pydocs")
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, documentation):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(corpora, "documentation", lambda: documentation)
    with pytest.warns(UserWarning, match="not cached"):
        assert load_text("pydocs").text == documentation


def test_shakespeare_from_test_data(monkeypatch, no_network):
    monkeypatch.setenv("TENSORGRAD_TEST_DATA", str(data_file("tinyshakespeare.txt").parent))
    text = load_text("shakespeare").text
    assert len(text) == 1_115_394 and len(set(text)) == 65
    assert hashlib.md5(text.encode()).hexdigest() == SHAKESPEARE_MD5


def test_shakespeare_is_downloaded_once(monkeypatch, own_cache):
    data = data_file("tinyshakespeare.txt").read_bytes()
    urls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: urls.append(url) or io.BytesIO(data))
    own_cache.mkdir()
    (own_cache / "tinyshakespeare.txt").write_bytes(data[:-1])  # cut short: not to be believed
    assert load_text("shakespeare").text == load_text("shakespeare").text == data.decode()
    assert urls == [corpora.SHAKESPEARE_URL]
    assert [p.name for p in own_cache.iterdir()] == ["tinyshakespeare.txt"]


def test_shakespeare_offline(no_network):
    with pytest.raises(UserError, match=r"cannot download .*\(Name or service not known\).*--data pydocs.*--data PATH"):
        load_text("shakespeare")


def test_shakespeare_missing_on_the_server(monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.HTTPError(url, 404, "Not Found", email.message.Message(), None)

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=r"cannot download shakespeare .*\(Not Found\)"):
        load_text("shakespeare")


def test_shakespeare_with_another_content(monkeypatch, own_cache):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>log in</html>"))
    with pytest.raises(UserError, match="another file than the expected one .*--data pydocs"):
        load_text("shakespeare")
    assert not own_cache.exists()
