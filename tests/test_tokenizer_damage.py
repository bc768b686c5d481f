"""Damaged and hostile files: each is one line that names the file, and nothing else ever escapes."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import trained

import gpt.text.tokenizers.load as load
from gpt.errors import UserError
from gpt.text import BPETokenizer, load_tokenizer
from gpt.text.tokenizers import from_gguf, read_tiktoken, to_gguf
from gpt.text.tokenizers.hugging_face import read_bpe

SMALL = BPETokenizer.train("abcabcab ab abc", 260, special_tokens=["<s>"]).hugging_face_json()


def changed(path, value):
    """SMALL with `value` at `path`."""
    description = copy.deepcopy(SMALL)
    place = description
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return description


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["model", "type"], "Unigram", "its model is Unigram, not BPE"),
        (["model", "byte_fallback"], True, "it has byte_fallback, but no token <0x00>"),
        (["model", "end_of_word_suffix"], "</w>", "has end_of_word_suffix '</w>'"),
        (["model", "merges", 0], ["a", "zz"], "not of two tokens that come before it"),
        (["model", "merges", 0], "abc", "not of two tokens that come before it"),
        (["model", "merges", 0], ["a", "€"], "KeyError"),
        (["model", "merges", 1], ["Ġ", "Ġ"], "is not in its vocabulary"),
        (["model", "merges"], SMALL["model"]["merges"] + SMALL["model"]["merges"][:1], "b'ab' is merged twice"),
        (["model", "merges"], {"a": 1}, "not of two tokens|is merged twice|KeyError|TypeError"),
        (["model", "merges"], None, "TypeError"),
        (["model", "vocab"], ["a"], "tokenizer that we can read"),
        (["model", "vocab", "a"], "0", "a token has the id '0'"),
        (["model", "vocab", "a"], 98, "two tokens have the id 98|has the id"),
        (["model", "vocab", "a"], 1 << 50, "a token has the id"),
        (["model", "vocab", ""], 1000, "a token without text"),
        (["model", "vocab", "日"], 1000, "outside GPT-2's byte alphabet"),
        (["model", "tensorgrad", "name"], 3, "its name is 3"),
        (["model", "tensorgrad", "config"], {"eos_token": 3}, "eos_token is 3"),
        (["model", "tensorgrad", "config"], {"chat_template": 3}, "chat_template is a int"),
        (["added_tokens", 0, "id"], 5, "its token '<s>' has two ids"),
        (["added_tokens", 0, "id"], None, "has two ids|has the id"),
        (["added_tokens", 0, "content"], 5, "the name of a token is 5"),
        (["added_tokens", 0, "lstrip"], True, "takes the spaces beside it along"),
        (["added_tokens"], [3], "AttributeError"),
        (["normalizer"], {"type": "Lowercase"}, "normalizer Lowercase is none of NFC"),
        (["pre_tokenizer"], None, r"pre-tokenizer \[None\] is not byte-level"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "is not byte-level"),
        (["pre_tokenizer", "add_prefix_space"], True, "adds a space before the text"),
        (["pre_tokenizer"], {"type": "Sequence", "pretokenizers": []}, "is not byte-level"),
        (["pre_tokenizer", "use_regex"], False, "is none of ByteLevel, Digits"),
        (["post_processor"], {"single": [3]}, "AttributeError"),
    ],
)
def test_what_we_cannot_be(tmp_path, path, value, reason):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(UserError, match=reason) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_merges_that_ranks_do_not_describe():
    """With a + bc and no b + c, Hugging Face never makes abc; merging by rank would, from another pair."""
    vocab = {c: i for i, c in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    description = changed(["model", "vocab"], vocab)
    description["added_tokens"] = []
    description["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    with pytest.raises(ValueError, match="b'abc' can come about by another merge than its own"):
        read_bpe(description)
    description["model"]["merges"][2] = ["ab", "c"]
    assert list(read_bpe(description)["ranks"]) == [b"a", b"b", b"c", b"ab", b"bc", b"abc"]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda children: st.lists(
    children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3), max_leaves=5)  # fmt: skip


def places(value, path=()):
    """The paths of all values in a description, the insides of the vocabulary left out but for one."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for n, (key, child) in enumerate(items):
        if n < 12:
            yield from places(child, (*path, key))


@settings(deadline=None, max_examples=400)
@given(st.sampled_from([p for p in places(SMALL) if p]), JSON)
def test_any_value_anywhere(tmp_path_factory, path, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(changed(list(path), value)))
    try:
        tokenizer = load_tokenizer(file)
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        tokenizer.encode("abc <s> abab", special="all")
        tokenizer.decode(range(tokenizer.vocab_size))
        tokenizer.dump()


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 4000), st.binary(max_size=4))
def test_cut_and_overwritten_files(tmp_path_factory, at, middle):
    whole = json.dumps(SMALL).encode()
    file = tmp_path_factory.getbasetemp() / "cut.json"
    for data in (whole[:at] + middle, whole[:at] + middle + whole[at + len(middle) :]):
        file.write_bytes(data)
        try:
            load_tokenizer(file).encode("abc")
        except UserError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '{"kind": "tokenizer"}', "\ud800"])
def test_hostile_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="is no tokenizer that we can read"):
        load_tokenizer(tmp_path)


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "MAX_BYTES", 1000)
    (tmp_path / "tokenizer.json").write_bytes(b" " * 1001)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        load_tokenizer(tmp_path)


def test_damaged_files_beside(tmp_path):
    trained().save(tmp_path)
    for name, content in (("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b'{"bos_token": 1}'),
                          ("chat_template.jinja", b"\xff")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<|im_start|>"}, "pad_token": "<none>", "x": 1,
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }))  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.chat_template) == (999, None, "d")


@pytest.mark.parametrize("line", ["YQ==", "YQ== x", "Y 1", "YQ== 1 2", "YQ== 0", " 7", "é 1"])
def test_rank_files(line):
    with pytest.raises(UserError, match="line 2 is no token"):
        read_tiktoken(f"YQ== 0\n{line}\n".encode())


def test_rank_files_on_disk(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\x0a\x05<unk>\x15\0\0\0\0")
    with pytest.raises(UserError, match="is a SentencePiece model; give the tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer .*merges.txt: No such file"):
        load_tokenizer(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": ["a", "a"]}, {"tokens": 3}, {"token_type": [1]}, {"token_type": None}, {"merges": ["a"]},
        {"merges": [3]}, {"model": None}, {"pre": 3}, {"token_type": [6] * 1000}, {"bos_token_id": "a"},
    ],
)  # fmt: skip
def test_gguf_entries(change):
    entries = to_gguf(trained()) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises((UserError, ValueError, TypeError, KeyError, AttributeError)):
        from_gguf(entries)
