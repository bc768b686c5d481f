"""The safetensors reader: what it reads, and all that it must refuse before believing it."""
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.interop.safetensors import INDEX, WEIGHTS, read_folder, read_safetensors

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]}}


def write(path, header, body=bytes(28), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def changed(name, **changes):
    return GOOD | {name: GOOD[name] | changes}


def test_every_float_type_is_read_as_float32(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes bfloat16")
    from safetensors.torch import save_file

    values = torch.tensor([[1.5, -2.0, 3.1415927], [0.1, 1e-30, 65504.0]])
    tensors = {str(t): values.to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_safetensors(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = stored[name].read()
        assert found.dtype == np.float32 and stored[name].shape == (2, 3)
        np.testing.assert_array_equal(found, tensor.float().numpy())


def test_float32_is_mapped_and_the_file_cannot_be_changed_through_it(tmp_path):
    path = write(tmp_path / "x.safetensors", json.dumps(GOOD).encode().ljust(160))
    before = path.read_bytes()
    array = read_safetensors(path)["a"].read()
    assert not array.flags.owndata and array.base is not None
    array[...] = 7
    assert path.read_bytes() == before


@pytest.mark.parametrize("header, message", [
    ({"a": GOOD["a"]}, "need 24 bytes, it has 28"),
    (changed("b", data_offsets=[20, 24]), "b begin at 20, not at 24"),
    (changed("b", data_offsets=[28, 32]), "b begin at 28, not at 24"),
    (changed("a", shape=[2, 4]), "needs 32 bytes, its offsets [0, 24] have 24"),
    (changed("a", dtype="F64"), "needs 48 bytes"),
    (changed("a", dtype="F33"), "unknown type 'F33'"),
    (changed("a", shape=[2**40, 2**40]), "needs 4,835,703,278,458,516,698,824,704 bytes"),
    (changed("a", shape=[2, -3]), "is not a type, a shape and two offsets"),
    (changed("a", shape=[True, 6]), "is not a type, a shape and two offsets"),
    (changed("a", data_offsets=[24, 0]), "have -24"),
    (changed("a", data_offsets=[0]), "is not a type, a shape and two offsets"),
    (changed("a", surprise=1), "is not a type, a shape and two offsets"),
    ({"a": 3}, "is not a type, a shape and two offsets"),
    (b"[1, 2]", "no object"),
    (b'{"a": 1, "a": 2}', "a key comes twice"),
    (b"[" * 100_000, "not readable as JSON"),
    (b"\xff{}", "not readable as JSON"),
])
def test_bad_headers(tmp_path, header, message):
    with pytest.raises(UserError) as error:
        read_safetensors(write(tmp_path / "x.safetensors", header))
    assert message in str(error.value) and "x.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 1000])
def test_header_length_beyond_the_file(tmp_path, length):
    with pytest.raises(UserError, match="its header claims"):
        read_safetensors(write(tmp_path / "x.safetensors", GOOD, length=length))


@pytest.mark.parametrize("size", [0, 3, 8, 50, 150])
def test_truncated(tmp_path, size):
    path = write(tmp_path / "x.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="x.safetensors"):
        read_safetensors(path)


def test_integers_are_no_weights(tmp_path):
    header = {"a": {"dtype": "I32", "shape": [7], "data_offsets": [0, 28]}}
    stored = read_safetensors(write(tmp_path / "x.safetensors", header))
    with pytest.raises(UserError, match="a has the type I32"):
        stored["a"].read()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors",
                                  "C:x.safetensors", "", "x.bin", ".."])
def test_an_index_that_points_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "x.safetensors", GOOD)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="only .safetensors files beside it are opened"):
        read_folder(folder)


def test_shards(tmp_path):
    write(tmp_path / "m-1.safetensors", {"a": GOOD["a"]}, np.arange(6, dtype="<f4").tobytes())
    write(tmp_path / "m-2.safetensors", {"b": GOOD["b"] | {"data_offsets": [0, 4]}}, bytes(4))
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    stored = read_folder(tmp_path)
    assert stored["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]] and stored["b"].shape == (2,)
    for wrong, message in (({"c": "m-1.safetensors"}, "no tensor c"), ({"a": "m-3.safetensors"}, "is not there"),
                           ({"a": 1}, "no weight_map"), ([], "no weight_map")):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match=message):
            read_folder(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("pytorch_model.bin", b"PK\x03\x04 any"), ("model.pt", b"\x80\x02}q"),
    ("model.safetensors", b"PK\x03\x04" + bytes(99)), ("model.safetensors", b"\x80\x04" + bytes(99))])
def test_pickles_are_refused_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is a pickle.*may run any program.*safetensors"):
        read_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=f"no {WEIGHTS}"):
        read_folder(tmp_path)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                                       max_size=3), max_leaves=8)
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "X"]) | json_values,
    "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=4) | json_values,
    "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), max_size=3) | json_values})


@settings(max_examples=400, deadline=None)
@given(header=st.dictionaries(st.text(max_size=5), entries | json_values, max_size=4), body=st.binary(max_size=64),
       length=st.none() | st.integers(0, 2**64 - 1))
def test_fuzzed_headers(tmp_path_factory, header, body, length):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write(path, json.dumps(header).encode(), body, length)
    read_all_or_refuse(path)


@settings(max_examples=400, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
       end=st.integers(0, 400))
def test_fuzzed_bytes(tmp_path_factory, places, end):
    path = write(tmp_path_factory.getbasetemp() / "bytes.safetensors", GOOD)
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[:end or None]))
    read_all_or_refuse(path)


def read_all_or_refuse(path):
    """Nothing but a UserError may come of any file, and no tensor is larger than the file."""
    try:
        for tensor in read_safetensors(path).values():
            assert tensor.read().size <= path.stat().st_size
    except UserError as error:
        assert path.name in str(error)
