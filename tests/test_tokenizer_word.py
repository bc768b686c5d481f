"""Words: vocabulary, cleaning, unknown words, spaces set anew, and Hugging Face's WordLevel."""

import json

import pytest
from tokenizer_samples import mixed

from gpt.errors import UserError
from gpt.text import CharTokenizer, WordTokenizer, get_tokenizer, load_tokenizer
from gpt.text.tokenizers import StreamDecoder, hugging_face_files

TEXT = "The cat sat on the mat. The dog (a big one) didn’t; the cat said: “Hello, world!”\n"


def test_vocabulary_is_by_frequency_then_alphabet():
    tokenizer = WordTokenizer.build_vocabulary(["b a c a", "b c a d"], vocab_size=7, min_frequency=2)
    assert tokenizer.words == ["a", "b", "c"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.eot_id == tokenizer.eos_id
    assert tokenizer.encode("a b c d") == [4, 5, 6, 1]
    assert WordTokenizer.build_vocabulary("b a c a b", vocab_size=5, min_frequency=1).words == ["a"]
    assert WordTokenizer.build_vocabulary("b a c a b", min_frequency=1).words == ["a", "b", "c"]
    assert tokenizer.decode([4, 1, 3]) == "a <unk> <eos>" and tokenizer.decode([4, 1, 5], skip_special=True) == "a b"
    assert tokenizer.token_bytes().tolist() == [0, 0, 0, 0, 2, 2, 2]


def test_decoding_sets_spaces_as_in_print():
    tokenizer = WordTokenizer.build_vocabulary(TEXT, min_frequency=1, lowercase=False, clean=False)
    assert tokenizer.decode(tokenizer.encode(TEXT + TEXT)) == TEXT + TEXT
    loose = TEXT.replace(".", " .").replace("(", "( ").replace(" sat", "   sat")
    assert tokenizer.decode(tokenizer.encode(loose)) == TEXT


def test_cleaning_and_lowercase():
    clean = WordTokenizer.build_vocabulary(TEXT, min_frequency=1)
    assert clean.split("The  dog’s\n“END” – 5€ ☃ x_y…") == [
        "the", "dog's", '"', "end", '"', "-", "5", "x_y", ".", ".", "."]  # fmt: skip
    assert clean.split("ΣΊΣΥΦΟΣ") == ["σίσυφοσ"]
    raw = WordTokenizer([], lowercase=False, clean=False)
    assert raw.split("It's well-known…\n\n☃") == ["It's", "well-known", "…", "\n", "\n", "☃"]


def test_names_of_special_tokens():
    tokenizer = WordTokenizer(["a", "<", ">", "eos"], clean=False)
    assert tokenizer.encode("a <eos>") == [4, 5, 7, 6] and tokenizer.encode("a <eos>", special="all") == [4, 3]


@pytest.mark.parametrize("options", [(True, True), (False, True), (True, False), (False, False)])
def test_hugging_face_gives_our_ids(options):
    hf = pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers is not installed")
    tokenizer = WordTokenizer.build_vocabulary(mixed(200_000), 60, 2, *options)
    theirs = hf.Tokenizer.from_str(json.dumps(tokenizer.hugging_face_json()))
    assert theirs.encode(mixed()).ids == tokenizer.encode(mixed(), special="all")


def test_save_and_load(tmp_path):
    tokenizer = WordTokenizer.build_vocabulary(TEXT, 20, 1, False, True)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.words, again.lowercase, again.clean) == (tokenizer.words, False, True)
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("options", [(True, True), (False, True), (True, False), (False, False)])
def test_what_hugging_face_has_is_read_back(tmp_path, options):
    """As written here, and as transformers writes it again."""
    words = WordTokenizer.build_vocabulary(mixed(50_000), 60, 2, *options)
    for tokenizer in (words, CharTokenizer.train("".join(c for c in mixed(50_000) if c.isprintable()))):
        for name, data in hugging_face_files(tokenizer).items():
            (tmp_path / name).write_bytes(data)
        assert load_tokenizer(tmp_path).to_json() == tokenizer.to_json()
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").to_json() == tokenizer.to_json()


@pytest.mark.parametrize("change", [
    lambda d: d["pre_tokenizer"]["pattern"].update(Regex=r"\w+"), lambda d: d["model"]["vocab"].update(new=9),
    lambda d: d.update(normalizer=None), lambda d: d["model"]["vocab"].update({"two words": 5}),
    lambda d: d["model"].update(vocab=["a"]), lambda d: d["model"].update(vocab={"a": "b"}),
])  # fmt: skip
def test_other_words_of_hugging_face_are_refused(tmp_path, change):
    description = WordTokenizer(["a"]).hugging_face_json()
    change(description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="no tokenizer that we can read"):
        load_tokenizer(tmp_path)


def test_stream_needs_to_know_what_stands_before():
    tokenizer = WordTokenizer.build_vocabulary(TEXT, min_frequency=1, lowercase=False, clean=False)
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids)):
        stream = StreamDecoder(tokenizer, after=ids[:cut])
        assert tokenizer.decode(ids[:cut]) + "".join(map(stream.feed, ids[cut:])) + stream.finish() == TEXT


def test_get_tokenizer():
    assert get_tokenizer("word:6", TEXT * 2).vocab_size == 6
    assert get_tokenizer("word", TEXT * 2).lowercase
    for name, text, message in (
        ("word:4", "a a", "of 4 ids has no room"), ("word", "", "from empty text"), ("word", "a b", "no word occurs 2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            get_tokenizer(name, text)


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], [3]])
def test_impossible_vocabularies(words):
    with pytest.raises(UserError, match="word vocabulary"):
        WordTokenizer(words)
