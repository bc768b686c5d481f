"""The tokenizer inside a GGUF file whose counts and lengths lie, or whose bytes were changed: one line, no memory."""
import resource
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import trained

from gpt.errors import UserError
from gpt.text.tokenizers import CharTokenizer, load_tokenizer, to_gguf


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key, value):
    if isinstance(value, bool):
        return text(key) + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if value and isinstance(value[0], int):
        return text(key) + struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def file_with(entries, count=None, extra=b""):
    return (b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries) if count is None else count)
            + b"".join(entry(key, value) for key, value in entries.items()) + extra)


WHOLE = file_with(to_gguf(trained(size=300)))
HUGE = 2**60
HOSTILE = {
    "entries": file_with({}, HUGE),
    "a text": file_with({}, 1, text("a") + struct.pack("<IQ", 8, HUGE)),
    "a key": file_with({}, 1, struct.pack("<Q", HUGE)),
    "an array of texts": file_with({}, 1, text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, HUGE)),
    "an array of numbers": file_with({}, 1, text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, HUGE)),
    "a text in an array": file_with({}, 1, text("t") + struct.pack("<IIQQQ", 9, 8, 2, HUGE, 0)),
    "nothing": b"", "four bytes": b"GGUF", "a pickle": b"\x80\x04K\x01.", "no tokenizer": file_with({}),
    "one token of many kinds": file_with(to_gguf(trained(size=300)) | {"tokenizer.ggml.tokens": ["a"]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_lies_is_refused_before_memory_is_taken(tmp_path, name):
    (tmp_path / "x.gguf").write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "x.gguf")
    assert "x.gguf" in str(error.value) and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_sound_files_are_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(WHOLE)
    assert load_tokenizer(tmp_path / "x.gguf").ranks == trained(size=300).ranks
    (tmp_path / "y.gguf").write_bytes(file_with(to_gguf(CharTokenizer("ab é€"))))
    assert load_tokenizer(tmp_path / "y.gguf").characters == "ab é€"


@settings(max_examples=400, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=5),
       end=st.integers(0, 1 << 20), early=st.booleans())
def test_fuzzed_bytes(tmp_path_factory, places, end, early):
    """Nothing but a UserError may come of any file."""
    content = bytearray(WHOLE)
    for place, value in places:
        content[place % (200 if early else len(content))] = value
    path = tmp_path_factory.getbasetemp() / "fuzz_tokenizer.gguf"
    path.write_bytes(bytes(content[:end % len(content) or None]) if end % 3 == 0 else bytes(content))
    try:
        load_tokenizer(path)
    except UserError as error:
        assert "\n" not in str(error)
