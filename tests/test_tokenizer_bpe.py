"""Byte-level BPE: training against rustbpe and a naive trainer, encoding against tiktoken, ids in any order."""

import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import use_tiktoken_files
from tokenizer_samples import made_up_words, mixed, trained

from gpt.errors import UserError
from gpt.text import BPETokenizer, TiktokenTokenizer, get_tokenizer
from gpt.text.tokenizers.bpe_training import train_ranks
from gpt.text.tokenizers.merges import byte_alphabet, find_merges, from_printable, printable
from gpt.text.tokenizers.patterns import CL100K, GPT2, O200K, PATTERNS

PARTS = ["a", " ", "\n", "é", "😀", "1", "'s", "<|endoftext|>"]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(PARTS)).map("".join))


def naive_ranks(text, size, pattern):
    """The definition: count all pairs anew, merge the most frequent, of equals the one of lower ranks."""
    words = [(list(piece.encode()), n) for piece, n in Counter(regex.findall(pattern, text)).items()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        counts = Counter()
        for word, n in words:
            for pair in pairwise(word):
                counts[pair] += n
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


@pytest.mark.parametrize("pattern", [GPT2, CL100K])
def test_ranks_of_a_naive_trainer(pattern):
    text = mixed(8_000)
    assert list(train_ranks([text], 456, pattern)) == naive_ranks(text, 456, pattern)


@settings(deadline=None, max_examples=60)
@given(st.text("ab ", max_size=60))
def test_ranks_with_overlapping_pairs(text):
    assert list(train_ranks([text], 300, r"\S+|\s+")) == naive_ranks(text, 300, r"\S+|\s+")


@pytest.mark.parametrize(("size", "pattern"), [(4096, GPT2), (32_768, GPT2), (4096, CL100K)])
def test_ranks_of_rustbpe(size, pattern):
    rustbpe = pytest.importorskip("rustbpe", reason="the reference trainer is not installed")
    text = mixed(200_000) + made_up_words()
    reference = rustbpe.Tokenizer()
    reference.train_from_iterator([text], vocab_size=size, pattern=pattern)
    theirs = {bytes(token): rank for token, rank in reference.get_mergeable_ranks()}
    same = train_ranks([text], size, pattern) == theirs  # two large dicts that differ take long to print
    assert same and len(theirs) == size


@pytest.mark.slow
def test_ranks_of_rustbpe_on_twelve_megabytes():
    """Python's own source, which is on every machine."""
    rustbpe = pytest.importorskip("rustbpe", reason="the reference trainer is not installed")
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:12_000_000]
    if len(text) < 8_000_000:
        pytest.skip(f"this Python comes with only {len(text):,} characters of its source")
    reference = rustbpe.Tokenizer()
    reference.train_from_iterator([text], vocab_size=32_768, pattern=CL100K)
    theirs = {bytes(token): rank for token, rank in reference.get_mergeable_ranks()}
    same = train_ranks([text], 32_768, CL100K) == theirs
    assert same and len(theirs) == 32_768


def test_several_texts_are_not_joined():
    assert train_ranks(["ab", "ab"], 257, GPT2) == train_ranks(["ab\nab"], 257, r"\w+")
    assert b"ab" in train_ranks(iter(["ab", "ab"]), 257, GPT2)


@settings(deadline=None)
@given(ANY_TEXT)
def test_round_trip(text):
    for pattern in ("gpt2", "cl100k"):
        tokenizer = trained(pattern)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_vocabulary():
    tokenizer = trained()
    assert tokenizer.vocab_size == 1000
    assert tokenizer.special_tokens == {"<|endoftext|>": 998, "<|im_start|>": 999}
    assert (tokenizer.eot_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (998, 998, None, None)
    assert list(tokenizer.ranks.values()) == list(range(998))
    assert tokenizer.pieces[:256] == [bytes([b]) for b in range(256)]
    assert len(tokenizer.encode(mixed())) < len(mixed().encode()) / 2


def test_little_text_gives_a_small_vocabulary():
    tokenizer = BPETokenizer.train("abab", 500)
    assert tokenizer.pieces[256:] == [b"ab", b"abab", b"<|endoftext|>"]
    assert tokenizer.decode(tokenizer.encode("cd")) == "cd"


@pytest.mark.parametrize("size", [0, 256])
def test_sizes_without_room(size):
    with pytest.raises(UserError, match=f"of {size} ids is too small: the bytes and the special tokens are 257"):
        BPETokenizer.train("abc", size)


def test_special_tokens_are_text_unless_allowed():
    tokenizer = trained()
    text = "a<|endoftext|>b<|im_start|>"
    assert not set(tokenizer.encode(text)) & tokenizer.special_ids
    allowed = tokenizer.encode(text, special="all")
    assert [i for i in allowed if i in tokenizer.special_ids] == [998, 999]
    assert [i for i in tokenizer.encode(text, ["<|im_start|>"]) if i >= 998] == [999]
    assert tokenizer.encode(text, special="<|endoftext|>").count(998) == 1
    assert tokenizer.decode(allowed) == text and tokenizer.decode(allowed, skip_special=True) == "ab"
    assert tokenizer.encode_batch([text, ""], special="all") == [allowed, []]
    with pytest.raises(UserError, match=r"no special token '<\|pad\|>'; it has <\|endoftext\|>, <\|im_start\|>"):
        tokenizer.encode(text, ["<|pad|>"])


def test_added_tokens_are_always_one_token_and_the_longest_wins():
    base = trained()
    tokenizer = BPETokenizer(base.ranks, added_tokens={"<a>": 1200, "<a><b>": 1300}, special_tokens={"<s>": 1100})
    assert tokenizer.encode("x<a><b><a>") == [*base.encode("x"), 1300, 1200]
    assert tokenizer.token_bytes()[[1100, 1200, 1250]].tolist() == [0, 3, 0]
    assert tokenizer.decode([1300, 1250, 1100]) == "<a><b><s>"  # 1250 stands for nothing
    assert tokenizer.vocab_size == 1301


def test_ids_in_any_order():
    """SmolLM2's ids start with special tokens; others are shuffled. Merging goes by the order of `ranks`."""
    base = trained()
    rng = np.random.default_rng(0)
    for ids in (range(17, 17 + len(base.ranks)), rng.permutation(len(base.ranks)).tolist()):
        moved = BPETokenizer(dict(zip(base.ranks, ids, strict=True)))
        assert moved.encode(mixed()) == np.array(ids)[base.encode_array(mixed())].tolist()
        assert moved.decode(moved.encode(mixed())) == mixed()


def test_a_byte_that_is_missing_leaves_no_id():
    base = trained()
    tokenizer = BPETokenizer({token: i for token, i in base.ranks.items() if token != b"\x07"})
    assert tokenizer.encode("a\x07b") == base.encode("ab")


def test_normalizer():
    tokenizer = BPETokenizer(trained().ranks, normalizer="NFC")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_patterns_that_pass_over_text_lose_none():
    tokenizer = BPETokenizer(trained().ranks, r"[a-z]+")
    assert tokenizer.decode(tokenizer.encode(mixed(10_000))) == mixed(10_000)


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "\n" * 1_000_000, " \n" * 500_000])
def test_runs_on_which_tiktoken_gives_up(text):
    for pattern in ("gpt2", "cl100k"):
        assert trained(pattern).decode(trained(pattern).encode(text)) == text


def test_the_patient_way_gives_the_same_ids():
    for pattern in PATTERNS:
        tokenizer = trained(pattern)
        assert tokenizer._encode_pieces(mixed(50_000)).tolist() == tokenizer.encode(mixed(50_000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": {}}, "at least one token"),
        ({"ranks": {b"a": 0, b"b": 0}}, "two tokens have the id 0"),
        ({"ranks": {b"a": -1}}, "a token has the id -1"),
        ({"ranks": {b"a": True}}, "a token has the id True"),
        ({"ranks": {b"a": 1 << 40}}, "a token has the id 1099511627776"),
        ({"ranks": {b"a": 0}, "special_tokens": {"x": 0}}, "two tokens have the id 0"),
        ({"ranks": {b"a": 0}, "special_tokens": {"": 1}}, "the name of a token is ''"),
        ({"ranks": {b"a": 0}, "pattern": "("}, r"the pattern '\(' is no regular expression"),
    ],
)
def test_impossible_vocabularies(arguments, message):
    with pytest.raises(UserError, match=message):
        BPETokenizer(**arguments)


def test_names():
    tokenizer = get_tokenizer("bpe:300", "once upon a time")
    assert tokenizer.vocab_size < 300 and get_tokenizer("bpe", "once upon a time").ranks == tokenizer.ranks
    for name in ("bpe:", "bpe"):
        with pytest.raises(UserError, match="from empty text"):
            get_tokenizer(name, "")
    with pytest.raises(UserError, match="no tokenizer 'bpe:x'; did you mean bpe"):
        get_tokenizer("bpe:x", "abc")
    with pytest.raises(UserError, match="is too small"):
        get_tokenizer("bpe:1", "abc")


def test_alphabet():
    assert len(set(byte_alphabet())) == 256 and printable(b" the\n") == "ĠtheĊ"
    assert from_printable(printable(bytes(range(256)))) == bytes(range(256))


def test_merges_come_back_from_ranks():
    tokenizer = trained()
    assert all(a + b == token for token, (a, b) in tokenizer.merges.items())
    assert find_merges([b"a", b"b", b"c", b"abc"]) == {b"abc": None}
    assert find_merges([b"a", b"b", b"c", b"abc", b"ab"])[b"abc"] is None  # its half comes too late
    assert find_merges([b"a", b"b", b"c", b"bc", b"ab", b"abc"])[b"abc"] == (b"a", b"bc")


def test_our_patterns_cut_as_tiktokens_do(monkeypatch, tmp_path):
    use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")
    for name, pattern in (("gpt2", GPT2), ("cl100k_base", CL100K)):
        published = TiktokenTokenizer(name)
        ours = BPETokenizer(published.ranks, pattern)
        text = mixed(300_000)
        assert ours.encode(text) == tiktoken.get_encoding(name).encode_ordinary(text) == published.encode(text)


def test_o200k_pattern_is_tiktokens():
    from tiktoken_ext import openai_public

    source = openai_public.o200k_base.__code__.co_consts
    texts = [c for const in source for c in (const if isinstance(const, tuple) else (const,)) if isinstance(c, str)]
    parts = [t for t in texts if "\\p{" in t or "\\s" in t]
    assert "|".join(parts) == O200K
