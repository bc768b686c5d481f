"""GGUF: every quantization read, llama.cpp writing the same text with our files, damaged files refused."""
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interop_tools import EXPORTS, MODERN, LlamaCpp, greedy, logits_of, make_model

from gpt.errors import UserError
from gpt.interop import export_gguf, load, load_gguf, load_with_tokenizer, shape_of
from gpt.interop.gguf_file import read_gguf
from gpt.text import CharTokenizer
from gpt.text.tokenizers import BPETokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

CHARACTERS = CharTokenizer("\n" + "".join(map(chr, range(32, 127))) + "é")
IDS = np.random.default_rng(3).integers(0, 97, 24).tolist()
RUNNABLE = [name for name in EXPORTS if name != "relu"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_llama_cpp_writes_the_same_text(tmp_path, name):
    kind, changes = EXPORTS[name]
    model = make_model(**changes)
    assert export_gguf(model, tmp_path / "x.gguf", CHARACTERS) == kind
    answer = LlamaCpp(tmp_path / "x.gguf").complete(IDS, 20)
    assert answer["usage"]["prompt_tokens"] == len(IDS)
    assert answer["choices"][0]["text"] == CHARACTERS.decode(greedy(model, IDS, 20))


def test_llama_cpp_with_ascii_characters(tmp_path):
    """A vocabulary without any merge."""
    tokenizer = CharTokenizer("\n" + "".join(map(chr, range(32, 127))))
    model = make_model(vocab_size=96)
    export_gguf(model, tmp_path / "x.gguf", tokenizer)
    answer = LlamaCpp(tmp_path / "x.gguf").complete("To be, or", 12)
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(model, tokenizer.encode("To be, or"), 12))
    assert load_with_tokenizer(tmp_path / "x.gguf")[1].characters == tokenizer.characters


@pytest.mark.parametrize("name", ["gpt2_untied", "llama"])
def test_llama_cpp_with_float16_and_byte_pairs(tmp_path, name):
    text = "Vier Fünftel der Bäcker süßen ihren Möhrenkuchen, 12 nicht. " * 4
    tokenizer = BPETokenizer.train(text, 300)
    model = make_model(**EXPORTS[name][1], vocab_size=tokenizer.vocab_size)
    export_gguf(model, tmp_path / "x.gguf", tokenizer, dtype="float16")
    halved, path, _ = load_gguf(tmp_path / "x.gguf")
    assert path == tmp_path / "x.gguf"
    ids = tokenizer.encode(text)[:20]
    assert load_with_tokenizer(tmp_path / "x.gguf")[1].encode(text) == tokenizer.encode(text)
    assert 0 < np.abs(logits_of(halved, [ids]) - logits_of(model, [ids])).max() < 0.02
    # as a prompt in text: llama.cpp's tokens must be ours
    answer = LlamaCpp(tmp_path / "x.gguf").complete(tokenizer.decode(ids), 12)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(halved, ids, 12))


@pytest.mark.parametrize("name", RUNNABLE)
def test_there_and_back(tmp_path, name):
    model = make_model(**EXPORTS[name][1])
    export_gguf(model, tmp_path / "x.gguf", CHARACTERS)
    again, tokenizer, config = load_with_tokenizer(tmp_path / "x.gguf")
    assert tokenizer.characters == CHARACTERS.characters
    assert shape_of(tmp_path / "x.gguf") == vars(config)
    # the file has a row more, the end of text that llama.cpp wants; it is never the likeliest
    both = logits_of(again, [IDS])
    np.testing.assert_allclose(both[..., 97], both[..., :97].mean(axis=-1), atol=1e-4)
    expected = make_model(**EXPORTS[name][1] | {"activation": config.activation})  # only gelu becomes gelu_tanh
    assert np.abs(both[..., :97] - logits_of(expected, [IDS])).max() <= 1e-4


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    for changes, reason in (({"activation": "relu"}, "no activation relu"), ({"norm_position": "post"}, "post"),
                            (MODERN | {"qkv_bias": True, "rope_scaling": "llama3"}, "llama3 goes with llama")):
        with pytest.raises(UserError, match=f"cannot be exported.*{reason}"):
            export_gguf(make_model(**changes), tmp_path / "x.gguf", CHARACTERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K",
                                  "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_quantized_tensors(tmp_path, kind):
    """Every kind gives what the package gguf makes of it. It cannot make the K kinds: their bytes are random."""
    quantization = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[quantization]
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    try:
        data = gguf.quants.quantize(rows, quantization)
    except NotImplementedError:
        data = np.random.default_rng(0).integers(0, 60, (3, 512 // elements * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    raw = None if kind in ("F32", "F16") else quantization
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("x", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, stored = read_gguf(tmp_path / "x.gguf")
    assert metadata["general.architecture"] == "llama"
    assert stored["x"].shape == (3, 512) and stored["x"].dtype == kind
    found = stored["x"].read()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, quantization))
    assert stored["before"].read().tolist() == [1] * 5


# ---- damage ----

def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def file_of(tensors=(), metadata=(), counts=None, body=b"", version=3):
    """Bytes of a GGUF file; metadata: (key, type number, value bytes); tensors: (name, dims, type number, offset)."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))
    for key, kind, value in metadata:
        head += string(key) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % 32) + body


ONE = [("w", (4, 2), 0, 0)]


def test_a_small_file_by_hand(tmp_path):
    (tmp_path / "x.gguf").write_bytes(file_of(
        ONE, [("a", 4, struct.pack("<I", 7)), ("b", 9, struct.pack("<IQ", 8, 2) + string("x") + string("é")),
              ("c", 9, struct.pack("<IQ3h", 3, 3, 1, 2, 3))], body=np.arange(8, dtype="<f4").tobytes()))
    metadata, stored = read_gguf(tmp_path / "x.gguf")
    assert metadata["a"] == 7 and metadata["b"] == ["x", "é"] and metadata["c"].tolist() == [1, 2, 3]
    assert stored["w"].read().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("content, message", [
    (b"GGML" + bytes(40), "not a GGUF file"),
    (b"", "an empty file"),
    (b"PK\x03\x04" + bytes(40), "is a pickle"),
    (file_of(version=1), "version 1 is not read"),
    (file_of(counts=(2**60, 0)), "entries are claimed"),
    (file_of(counts=(0, 2**60)), "entries are claimed"),
    (file_of(metadata=[("a", 8, struct.pack("<Q", 2**62))]), "bytes are wanted"),
    (file_of(metadata=[("a", 9, struct.pack("<IQ", 0, 2**62))]), "bytes are wanted"),
    (file_of(metadata=[("a", 9, struct.pack("<IQ", 8, 2**62))]), "entries are claimed"),
    (file_of(metadata=[("a", 9, struct.pack("<IQQ", 8, 2, 0) + struct.pack("<Q", 2**62))]), "bytes are wanted"),
    (file_of(metadata=[("a", 9, struct.pack("<IQ", 9, 1))]), "an array of the type 9"),
    (file_of(metadata=[("a", 99, b"")]), "unknown type 99"),
    (file_of(metadata=[("a", 0, b"1")] * 2), "'a' comes twice"),
    (file_of(ONE * 2, body=bytes(64)), "'w' comes twice"),
    (file_of([("w", (2**62, 4), 0, 0)], body=bytes(64)), "claims bytes 0 to"),
    (file_of([("w", (4, 2), 0, 2**63)], body=bytes(64)), "claims bytes"),
    (file_of([("w", (4, 2), 0, 4)], body=bytes(64)), "claims bytes"),
    (file_of([*ONE, ("v", (4, 2), 0, 0)], body=bytes(64)), "claims bytes"),
    (file_of([("w", (33,), 8, 0)], body=bytes(64)), "not a multiple of 32"),
    (file_of([("w", (4, 2), 4, 0)], body=bytes(64)), "quantized in a way"),
    (file_of([("w", (), 0, 0)], body=bytes(64)), "has 0 dimensions"),
    (file_of(ONE, [("general.alignment", 4, struct.pack("<I", 0))], body=bytes(64)), "alignment is 0"),
    (file_of(ONE, body=bytes(31)), "claims bytes 0 to 32 of 31"),
])
def test_bad_files(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_gguf(tmp_path / "x.gguf")
    assert message in str(error.value) and "x.gguf" in str(error.value) and "\n" not in str(error.value)


def test_models_that_are_not_known(tmp_path):
    for metadata, message in ((("general.architecture", 8, string("mamba")), "architecture 'mamba' are not read here"),
                              (("general.architecture", 4, struct.pack("<I", 3)), "is 3, not of type str"),
                              (("x", 4, struct.pack("<I", 3)), "general.architecture is missing")):
        (tmp_path / "x.gguf").write_bytes(file_of(ONE, [metadata], body=bytes(32)))
        with pytest.raises(UserError, match=message):
            load(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    export_gguf(make_model(n_layer=1, n_embd=8, n_head=2, **MODERN), path, CHARACTERS)
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
       end=st.integers(0, 1 << 20), early=st.booleans())
def test_fuzzed_bytes(tmp_path_factory, whole, places, end, early):
    """Nothing but a UserError may come of any file."""
    content = bytearray(whole)
    for place, value in places:
        content[place % (400 if early else len(content))] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(bytes(content[:end % len(content) or None]) if end % 3 else bytes(content))
    try:
        load_with_tokenizer(path)
    except UserError as error:
        assert "\n" not in str(error)
