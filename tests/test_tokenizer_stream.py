"""StreamDecoder: joined, what it gives is what decode gives; never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import trained

from gpt.errors import UserError
from gpt.text import CharTokenizer, StreamDecoder


def parts(tokenizer, ids, after=()):
    stream = StreamDecoder(tokenizer, after)
    return [*map(stream.feed, ids), stream.finish()]


@settings(deadline=None)
@given(st.text())
def test_text_comes_in_whole_characters(text):
    tokenizer = trained()
    pieces = parts(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text and pieces[-1] == ""


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 999)))
def test_any_ids_give_what_decode_gives(ids):
    assert "".join(parts(trained(), ids)) == trained().decode(ids)


def test_a_character_of_several_tokens():
    tokenizer = trained()
    ids = [tokenizer.ranks[bytes([b])] for b in "é😀".encode()]
    assert parts(tokenizer, ids) == ["", "é", "", "", "", "😀", ""]
    assert parts(tokenizer, ids[:4]) == ["", "é", "", "", "\ufffd"]
    assert parts(tokenizer, ids[2:4] + tokenizer.encode("a")) == ["", "", "\ufffda", ""]
    assert parts(tokenizer, ids[1:2], after=ids[:1]) == ["\ufffd", ""]  # what stood before was shown already


def test_unknown_ids():
    with pytest.raises(UserError, match="token id 3 is outside the char vocabulary"):
        StreamDecoder(CharTokenizer.train("abc")).feed(3)
