"""Vocabularies of others: Hugging Face's tokenizer.json, GPT-2's pair of files, tiktoken's ranks, GGUF."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from text_data import use_tiktoken_files
from tokenizer_samples import mixed, trained

from gpt.errors import UserError
from gpt.text import BPETokenizer, CharTokenizer, TiktokenTokenizer, WordTokenizer, load_tokenizer
from gpt.text.tokenizers import from_gguf, hugging_face_files, read_gguf, to_gguf, write_gpt2, write_tiktoken

PATTERNS = ("gpt2", "cl100k", "qwen2", "smollm", "o200k")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def hf():
    return pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers is not installed")


@pytest.fixture
def published(monkeypatch, tmp_path):
    use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")
    return TiktokenTokenizer


def theirs(hf, tokenizer):
    return hf.Tokenizer.from_str(json.dumps(tokenizer.hugging_face_json()))


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hugging_face_gives_our_ids(hf, pattern):
    tokenizer = trained(pattern)
    ids = tokenizer.encode(mixed(), special="all")
    assert theirs(hf, tokenizer).encode(mixed()).ids == ids
    assert theirs(hf, tokenizer).decode(ids, skip_special_tokens=False) == mixed()


O200K = "fb374d419588a4632f3f557e76b4b70aebbca790"  # what tiktoken calls the file of o200k_base in its cache


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_tiktoken_hugging_face_and_ours_agree(hf, published, name):
    if name == "o200k_base" and not Path(os.environ["TIKTOKEN_CACHE_DIR"], O200K).exists():
        pytest.skip("o200k_base is not in tiktoken's cache: name one that has it in TIKTOKEN_CACHE_DIR")
    tokenizer = published(name)
    expected = tiktoken.get_encoding(name).encode(mixed(), allowed_special="all")
    assert tokenizer.encode(mixed(), special="all") == expected
    written = json.dumps(tokenizer.hugging_face_json())
    assert hf.Tokenizer.from_str(written).encode(mixed()).ids == expected
    again = BPETokenizer.from_json(json.loads(written))
    assert again.encode(mixed(), special="all") == expected
    assert again.ranks == tokenizer.ranks and again.special_tokens == tokenizer.special_tokens
    assert None not in again.merges.values()


def test_auto_tokenizer_opens_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = trained("cl100k").configure({"eos_token": "<|im_start|>", "chat_template": TEMPLATE})
    char, word = CharTokenizer.train(mixed()), WordTokenizer.build_vocabulary(mixed())
    for ours in (tokenizer, char, word):
        write(tmp_path, hugging_face_files(ours, max_length=77))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = mixed(50_000).replace("<|endoftext|>", "")
        assert auto(text)["input_ids"] == ours.encode(text)
        assert (auto.eos_token_id, auto.model_max_length) == (ours.eos_id, 77)
        if ours is tokenizer:
            assert auto.apply_chat_template([{"content": "x"}], tokenize=False) == "x"
        if ours is not word:  # whose spaces are set anew
            assert auto.decode(ours.encode(text)) == text
    tokenizer.configure({"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("make", ["gpt2", "llama3"])
def test_we_open_what_transformers_writes(hf, tmp_path, make):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source = theirs(hf, trained("gpt2" if make == "gpt2" else "llama3"))
    if make == "llama3":
        source.post_processor = hf.processors.Sequence([
            hf.processors.ByteLevel(trim_offsets=False),
            hf.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 999)]),
        ])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=source, eos_token="<|endoftext|>",
                                                chat_template=TEMPLATE)  # fmt: skip
    fast.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = mixed(100_000)
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert prefix + tokenizer.encode(text, special="all") == fast(text)["input_ids"]
    assert (tokenizer.eos_id, tokenizer.chat_template) == (998, TEMPLATE)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == ((999, True) if make == "llama3" else (None, False))


def test_merges_as_strings_and_as_pairs():
    description = trained().hugging_face_json()
    old = json.loads(json.dumps(description))
    old["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    assert BPETokenizer.from_json(old).ranks == BPETokenizer.from_json(description).ranks == trained().ranks


def test_the_two_spellings_of_a_split():
    description = trained("llama3").hugging_face_json()
    split = description["pre_tokenizer"]["pretokenizers"][0]
    split |= {"behavior": "Removed", "invert": True}
    assert BPETokenizer.from_json(description).encode(mixed(200_000)) == trained("llama3").encode(mixed(200_000))


def test_unicode_forms_and_a_token_without_a_merge(hf):
    description = trained("qwen2").hugging_face_json()
    description["normalizer"] = {"type": "NFC"}
    description["model"]["vocab"]["never"] = 1000
    tokenizer = BPETokenizer.from_json(description)
    text = mixed(300_000)
    expected = hf.Tokenizer.from_str(json.dumps(description)).encode(text + " never").ids
    assert tokenizer.encode(text + " never", special="all") == expected and 1000 not in expected
    assert tokenizer.decode([1000]) == "never"
    assert BPETokenizer.from_json(tokenizer.to_json()).fingerprint() == tokenizer.fingerprint()


def test_whole_pieces_without_a_merge(hf):
    """Llama 3's ignore_merges: a piece of text that is a token becomes it, whatever the merges say."""
    description = trained("llama3").hugging_face_json()
    description["model"]["vocab"]["xqz"] = 1000
    description["model"]["ignore_merges"] = True
    tokenizer = BPETokenizer.from_json(description)
    assert tokenizer.encode("xqz")[-1] == 1000 != tokenizer.encode("xqzz")[-1]
    text = mixed(100_000) + "xqz xqzz"
    again = tokenizer.hugging_face_json()
    assert again["model"]["ignore_merges"]
    for form in (description, again):
        assert hf.Tokenizer.from_str(json.dumps(form)).encode(text).ids == tokenizer.encode(text, special="all")


def test_our_own_file_keeps_everything(tmp_path):
    base = trained()
    tokenizer = BPETokenizer(base.ranks, "smollm", special_tokens={"<s>": 1010}, added_tokens={"<think>": 1020},
                             unmerged={1015: b"\xff\xfe"}, normalizer="NFKC", name="mine",
                             config={"bos_token": "<s>", "add_bos_token": True, "chat_template": TEMPLATE})  # fmt: skip
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for field in ("ranks", "pattern", "special_tokens", "added_tokens", "unmerged", "normalizer", "name", "bos_id",
                  "adds_bos", "eos_id", "chat_template", "pieces"):  # fmt: skip
        assert getattr(again, field) == getattr(tokenizer, field), field
    assert again.fingerprint() == tokenizer.fingerprint()


def test_gpt2_pair_of_files(tmp_path, published):
    for tokenizer in (trained(), published("gpt2")):
        write(tmp_path, write_gpt2(tokenizer))
        again = load_tokenizer(tmp_path / "vocab.json")
        assert again.ranks == tokenizer.ranks and again.eot_id == tokenizer.eot_id
        assert again.encode(mixed(200_000)) == tokenizer.encode(mixed(200_000))
    with pytest.raises(UserError, match="does not cut text as GPT-2 does"):
        write_gpt2(trained("cl100k"))


def test_openais_files_are_read_as_they_are(tmp_path, published):
    published("gpt2")
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    names = {"encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
             "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}  # fmt: skip
    write(tmp_path, {name: (cache / file).read_bytes() for name, file in names.items()})
    tokenizer = load_tokenizer(tmp_path / "encoder.json")
    assert tokenizer.encode(mixed(200_000)) == tiktoken.get_encoding("gpt2").encode_ordinary(mixed(200_000))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)


def test_rank_files(tmp_path, published):
    cl100k = published("cl100k_base")
    for name, tokenizer in (("cl100k_base", cl100k), ("tokenizer", trained("llama3"))):
        file = tmp_path / (f"{name}.tiktoken" if name == "cl100k_base" else "tokenizer.model")
        file.write_bytes(write_tiktoken(tokenizer))
        again = load_tokenizer(file)
        assert again.ranks == tokenizer.ranks and again.encode(mixed(200_000)) == tokenizer.encode(mixed(200_000))
        assert tiktoken.load.load_tiktoken_bpe(str(file)) == tokenizer.ranks
    shuffled = BPETokenizer(dict(zip(trained().ranks, range(998, 0, -1), strict=False)))
    with pytest.raises(UserError, match="not in the order of its merges"):
        write_tiktoken(shuffled)


@pytest.mark.parametrize("pattern", PATTERNS[:-1])
def test_gguf_entries(pattern):
    tokenizer = trained(pattern)
    entries = to_gguf(tokenizer, vocab_size=1024)
    assert len(entries["tokenizer.ggml.tokens"]) == len(entries["tokenizer.ggml.token_type"]) == 1024
    again = from_gguf(entries)
    assert again.ranks == tokenizer.ranks and again.special_tokens == tokenizer.special_tokens
    assert again.pattern == tokenizer.pattern and again.eos_id == tokenizer.eos_id
    assert again.encode(mixed(200_000), special="all") == tokenizer.encode(mixed(200_000), special="all")


def test_gguf_roles():
    base = trained()
    config = {"bos_token": "<|im_start|>", "add_bos_token": True, "chat_template": TEMPLATE}
    tokenizer = BPETokenizer(base.ranks, special_tokens=base.special_tokens, added_tokens={"<think>": 1000},
                             config=config)  # fmt: skip
    again = from_gguf(to_gguf(tokenizer))
    assert again.config() == tokenizer.config() and again.added_tokens == {"<think>": 1000}


def test_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    tokenizer = trained("smollm").configure({"eos_token": "<|im_start|>", "chat_template": TEMPLATE})
    entries = to_gguf(tokenizer)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for key, value in entries.items():
        kind = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        kind[type(value)](key, value)
    writer.add_tensor("w", np.zeros(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    again = read_gguf(tmp_path / "m.gguf")
    assert again.encode(mixed(200_000)) == tokenizer.encode(mixed(200_000))
    assert (again.eos_id, again.chat_template) == (999, TEMPLATE)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    (tmp_path / "none.gguf").write_bytes(b"text")
    for name, words in (("cut.gguf", "truncated or damaged"), ("none.gguf", "not a GGUF file")):
        with pytest.raises(UserError, match=f"{name}: .*{words}") as error:
            load_tokenizer(tmp_path / name)
        assert str(error.value).count(name) == 1
    tokenizer.configure({"eos_token": "<|endoftext|>"})


def test_characters_become_byte_pairs_for_gguf():
    entries = to_gguf(CharTokenizer.train("h é€"))
    assert entries["tokenizer.ggml.tokens"] == ["Ġ", "h", "Ã©", "âĤ¬", "<|endoftext|>"]
    assert entries["tokenizer.ggml.merges"] == ["Ã ©", "â Ĥ", "âĤ ¬"]
    assert entries["tokenizer.ggml.eos_token_id"] == 4


def test_what_gguf_has_no_name_for():
    with pytest.raises(UserError, match="no tokenizer of the kind word"):
        to_gguf(WordTokenizer(["a"]))
    with pytest.raises(UserError, match="does not know the pattern"):
        to_gguf(trained("o200k"))
    entries = to_gguf(trained())
    with pytest.raises(UserError, match="of the kind 'bert'; we read"):
        from_gguf(entries | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(UserError, match="pre-tokenizer 'poro' is none of gpt-2, "):
        from_gguf(entries | {"tokenizer.ggml.pre": "poro"})
