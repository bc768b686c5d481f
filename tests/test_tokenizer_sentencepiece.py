"""SentencePiece's pieces: ids of Hugging Face's tokenizers and of llama.cpp, bytes, spaces, files."""

import json
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_llama_cpp import write_model
from tokenizer_samples import mixed

from gpt.errors import UserError
from gpt.text import StreamDecoder, load_tokenizer
from gpt.text.tokenizers import SentencePieceTokenizer, from_gguf, hugging_face_files, to_gguf
from gpt.text.tokenizers.sentencepiece import read_sentencepiece

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
CONFIG = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "t"}
MERGED = "▁▁ ▁▁▁▁ he ▁w or ll el ▁he ▁hel ▁hell ▁hello ▁wor ▁worl ▁world lo in th ▁th ▁the an ▁a 本語 日本語 ,, 😀👩"


def pieces(prefix="always", extra=()):
    """A small vocabulary: three special tokens, the bytes, what MERGED lists with falling scores, single characters."""
    merged = [*MERGED.split(" "), "\r\n", *extra]
    single = sorted(set("▁ \nabcdefghijklmnopqrstuvwxyzHW.,'\r😀👩日本語é") - {" "})
    tokens = {token: i for i, token in enumerate([*merged, *single], 259)}
    return SentencePieceTokenizer(tokens, {i: 259.0 - i for i in tokens.values()}, range(3, 259), SPECIAL,
                                  {"<think>": 259 + len(tokens)}, prefix, config=CONFIG)  # fmt: skip


def naive(tokenizer, text):
    parts = list((" " + text).replace(" ", "▁"))
    while True:
        found = [(tokenizer.scores[tokenizer.tokens[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:],
                 strict=False)) if a + b in tokenizer.tokens]  # fmt: skip
        if not found:
            return [i for part in parts for i in tokenizer._ids_of(part)]
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["hello", " world", "l", "  ", "    ", "é", "ß", "日本語", "🙂", "\r\n"]), min_size=1))
def test_the_definition_and_the_round_trip(words):
    text = "".join(words)
    for tokenizer in (pieces(), pieces(extra=["o▁w"])):
        ids = tokenizer.encode(text)
        assert ids == naive(tokenizer, text) and tokenizer.decode(ids) == text
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.feed, ids)) + stream.finish() == text


@pytest.mark.parametrize("start", ["", " "])
@pytest.mark.parametrize("prefix", ["always", "first", "never"])
def test_hugging_face_gives_our_ids(prefix, start):
    hf = pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers is not installed")
    tokenizer = pieces(prefix)
    text = start + "hello world</s> hello<think>the the\n  日本語 ß </s>" + mixed(20_000)
    ids = tokenizer.encode(text, special="all")
    theirs = hf.Tokenizer.from_str(json.dumps(tokenizer.hugging_face_json()))
    assert theirs.encode(text).ids == [1, *ids]
    if prefix == "always" or not start:  # with "first", a space that a text starts with is taken for the prefix
        assert tokenizer.decode(ids) == text


def test_files(tmp_path):
    tokenizer = pieces("never")
    for name, data in hugging_face_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    theirs = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "ours.json")
    for again in (theirs, load_tokenizer(tmp_path / "ours.json"), from_gguf(to_gguf(tokenizer, 400))):
        assert again.encode(mixed(100_000), "all") == tokenizer.encode(mixed(100_000), "all")
        assert again.config() == tokenizer.config() and again.added_tokens == tokenizer.added_tokens
        assert (again.prefix, again.adds_bos, again.eot_id) == ("never", True, 2)
    assert load_tokenizer(tmp_path / "ours.json").fingerprint() == tokenizer.fingerprint()


def test_unknown_normalizers():
    description = pieces().hugging_face_json()
    assert read_sentencepiece(description).encode(mixed(50_000)) == pieces().encode(mixed(50_000))
    with pytest.raises(ValueError, match="are not those of Llama 2"):
        read_sentencepiece(description | {"normalizer": {"type": "NFC"}})


def test_llama_cpp_gives_our_ids(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp, which carries llama.cpp, is not installed")
    tokenizer, text = pieces(), mixed(20_000).replace("\0", "").replace("<|endoftext|>", "")
    write_model(gguf, to_gguf(tokenizer), tmp_path / "model.gguf")
    parameters = llama.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(tmp_path / "model.gguf"), 128, False
    server = llama.Server(parameters)
    request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps({"content": text}).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["tokens"] == tokenizer.encode(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ({}, {}), ({"a": 0}, {}), ({"a": 0}, {0: "x"}), ({"a": 0, "b": 0}, {0: 1.0}), ({"a": -1}, {-1: 0}),
        ({"a": 0}, {0: 0.0}, [1]), ({"": 0}, {0: 0.0}), ({"a": 0}, {0: 0.0}),
    ],
)  # fmt: skip
def test_impossible_vocabularies(arguments):
    with pytest.raises(UserError):
        SentencePieceTokenizer(*arguments)
