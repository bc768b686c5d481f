"""Tokenizers: round trips, published ids, byte counts, the JSON file, and every error message."""

import json

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import use_tiktoken_files

from gpt.errors import UserError
from gpt.text import CharTokenizer, TiktokenTokenizer, get_tokenizer, load_tokenizer

MIXED = "naïve 你好 👩‍🚀\n\t\x07<|endoftext|> e\u0301 \U0010ffff"


@pytest.fixture
def tiktoken_files(monkeypatch, tmp_path):
    use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")


@pytest.fixture
def gpt2(tiktoken_files):
    return TiktokenTokenizer("gpt2")


@pytest.fixture
def cl100k(tiktoken_files):
    return TiktokenTokenizer("cl100k_base")


def test_char_ids_are_in_code_point_order():
    tokenizer = CharTokenizer.train("hello\n😀é")
    assert tokenizer.characters == "\nehloé😀"
    assert tokenizer.encode("hello") == [2, 1, 3, 3, 4]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("char", 7, None)
    assert tokenizer.token_bytes().tolist() == [1, 1, 1, 1, 1, 2, 4]


@settings(deadline=None)
@given(st.text(min_size=1), st.data())
def test_char_round_trip(text, data):
    tokenizer = CharTokenizer.train(text)
    part = "".join(data.draw(st.lists(st.sampled_from(text))))
    ids = tokenizer.encode(part)
    assert tokenizer.decode(ids) == part
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(part.encode())


def test_char_names_what_it_does_not_know():
    tokenizer = CharTokenizer.train("abc")
    named = r"'\\n' \(U\+000A\), 'z' \(U\+007A\), '€' \(U\+20AC\)"
    with pytest.raises(UserError, match=f"vocabulary of 3 lacks {named}:") as error:
        tokenizer.encode("ab€zcz\n")
    assert "--tokenizer gpt2" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"'7' \(U\+0037\), '8' \(U\+0038\), '9' \(U\+0039\) and 3 more:"):
        tokenizer.encode("0123456789xyz")


def test_char_knows_no_character_between_its_own():
    tokenizer = CharTokenizer.train("ac")
    for unknown in "\0b`d\U0010ffff":
        with pytest.raises(UserError):
            tokenizer.encode(f"a{unknown}")


@pytest.mark.parametrize("characters", ["", "aba"])
def test_char_refuses_impossible_vocabularies(characters):
    with pytest.raises(UserError, match="at least one character, and none twice"):
        CharTokenizer(characters)


def test_char_needs_text():
    with pytest.raises(UserError, match="from empty text"):
        get_tokenizer("char", "")


def test_published_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]  # OpenAI's GPT-2 encoder gives these
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.name) == (50257, 50256, "gpt2")


def test_cl100k(cl100k):
    assert cl100k.encode("Hello world") == [9906, 1917]
    assert (cl100k.vocab_size, cl100k.eot_id) == (100277, 100257)
    assert cl100k.special_ids == {100257, 100258, 100259, 100260, 100276}
    assert cl100k.decode(cl100k.encode(MIXED)) == MIXED


def test_names_of_special_tokens_are_ordinary_text(gpt2):
    ids = gpt2.encode(MIXED)
    assert gpt2.eot_id not in ids
    assert gpt2.decode(ids) == MIXED
    assert gpt2.decode([gpt2.eot_id]) == "<|endoftext|>"


def test_array_and_list_agree(gpt2):
    assert gpt2.encode_array(MIXED).tolist() == gpt2.encode(MIXED)
    assert gpt2.encode(MIXED) == tiktoken.get_encoding("gpt2").encode_ordinary(MIXED)


def test_broken_surrogates_are_encoded_as_tiktoken_does(gpt2):
    for text in ("\ud800a", "x\ude00", "\ud83d\ude00"):
        assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_token_bytes(gpt2, cl100k):
    for tokenizer in (gpt2, cl100k):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int64
        assert sizes[tokenizer.encode(MIXED)].sum() == len(MIXED.encode())
        assert not sizes[list(tokenizer.special_ids)].any()
    assert cl100k.token_bytes()[100256] == 0  # an id that cl100k_base leaves unused ...
    assert cl100k.decode([9906, 100256, 1917]) == "Hello world"  # ... and that stands for nothing


def test_a_cut_character_decodes_to_a_replacement(gpt2):
    ids = gpt2.encode("😀")
    assert len(ids) > 1
    assert gpt2.decode(ids[:-1]).strip("\ufffd") == ""
    assert gpt2.decode_bytes(ids[:-1]) == "😀".encode()[:-1]


@pytest.mark.parametrize("ids", [[0, 3], [-1], np.array([5])])
def test_decode_refuses_ids_outside(ids):
    tokenizer = CharTokenizer.train("abc")
    assert tokenizer.decode([]) == "" and tokenizer.decode(np.array([2, 0])) == "ca"
    with pytest.raises(UserError, match=r"token id (3|-1|5) is outside the char vocabulary \(0 \.\. 2\)"):
        tokenizer.decode(ids)


def test_save_and_load(tmp_path, gpt2):
    char = CharTokenizer.train('a"\\\n\u2028é😀')
    char.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == "char"
    assert load_tokenizer(tmp_path).characters == char.characters
    assert get_tokenizer(str(tmp_path)).fingerprint() == char.fingerprint()
    gpt2.save(tmp_path / "other.json")
    assert load_tokenizer(tmp_path / "other.json").encode("Hello world") == [15496, 995]
    assert gpt2.fingerprint() != char.fingerprint() != CharTokenizer.train("ab").fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["other.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}", "\xff", '{"model": {"type": "BPE"}}', '{"kind": "word"}', '{"kind": []}'),
        *('{"kind": "char"}', '{"kind": "char", "characters": 3}', '{"kind": "char", "characters": ""}'),
        '{"kind": "tiktoken", "name": "gpt5"}',
    ],
)
def test_damaged_descriptions(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_missing_description(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*tokenizer.json: No such file"):
        load_tokenizer(tmp_path)


def test_unknown_name():
    with pytest.raises(UserError, match="no tokenizer 'gpt-2'; did you mean gpt2.*cl100k_base"):
        get_tokenizer("gpt-2", "abc")


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_offline(monkeypatch, tmp_path, name):
    def offline(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"vocabulary of {name} .*TIKTOKEN_CACHE_DIR.*--tokenizer char"):
        get_tokenizer(name, "abc")
