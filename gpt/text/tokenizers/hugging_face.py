"""Hugging Face's tokenizer.json, read and written for byte-level BPE.

It is also the form in which our own BPE vocabularies are saved, so that other tools open the folder of a run. What the
form has no place for (name, roles, chat template) stands under "tensorgrad" in its "model", where readers do not look.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from .merges import find_merge, from_printable, printable
from .patterns import from_pre_tokenizer, to_pre_tokenizer

OURS = "tensorgrad"
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MAX_ID = 1 << 24  # far above any vocabulary; an id beyond it is damage, and a table up to it would fill the memory


def document(model: Mapping[str, Any], *, added_tokens=(), bos=None, **parts: Any) -> dict[str, Any]:
    """A whole tokenizer.json around `model`: `parts` are normalizer, pre_tokenizer, decoder and so on.

    added_tokens: (name, id, special) triples; bos: the (name, id) that stands before every text, if one does.
    """
    added = [{"id": i, "content": name, "special": special, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for name, i, special in sorted(added_tokens, key=lambda token: token[1])]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    if bos is not None:
        name, i = bos
        start, text, pair = ({"SpecialToken": {"id": name, "type_id": 0}}, *(
            {"Sequence": {"id": letter, "type_id": n}} for n, letter in enumerate("AB")))
        parts["post_processor"] = {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, start, pair],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
        }  # fmt: skip
    return {"version": "1.0", "added_tokens": added} | empty | parts | {"model": dict(model)}


def write_bpe(tokenizer) -> dict[str, Any]:
    """The description of a BPETokenizer."""
    pairs = tokenizer.merges
    vocab = {printable(token): i for token, i in tokenizer.ranks.items()}
    vocab |= {printable(piece): i for i, piece in tokenizer.unmerged.items()}
    vocab |= tokenizer.special_tokens | tokenizer.added_tokens  # else `tokenizers` numbers them as it likes
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": None in pairs.values(),  # such tokens stand only for a piece of text that is exactly they
        "vocab": vocab, "merges": [[printable(part) for part in pair] for pair in pairs.values() if pair],
        OURS: {"name": tokenizer.name, "config": tokenizer.config()},
    }  # fmt: skip
    names = [(name, i, True) for name, i in tokenizer.special_tokens.items()]
    names += [(name, i, False) for name, i in tokenizer.added_tokens.items()]
    bos = next(((name, i) for name, i, _ in names if i == tokenizer.bos_id), None) if tokenizer.adds_bos else None
    return document(
        model, added_tokens=names, bos=bos, decoder=BYTE_LEVEL, pre_tokenizer=to_pre_tokenizer(tokenizer.pattern),
        normalizer=tokenizer.normalizer and {"type": tokenizer.normalizer},
    )  # fmt: skip


def read_bpe(description: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a BPETokenizer from a tokenizer.json; raises ValueError with the reason where it is none, or
    does what merging by rank cannot do."""
    model = description["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model.get('type')}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise ValueError(f"it has {key} {model[key]!r}, so it is not byte-level")
    normalizer = description.get("normalizer")
    if normalizer is not None:
        normalizer = normalizer.get("type")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"its normalizer {normalizer} is none of {', '.join(NORMALIZERS)}")
    special, added = {}, {}
    for token in description.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"its token {token['content']!r} takes the spaces beside it along")
        (special if token.get("special") else added)[token["content"]] = token["id"]
    vocab = dict(model["vocab"])
    for name in special.keys() | added.keys():
        if vocab.pop(name, i := (special | added)[name]) != i:
            raise ValueError(f"its token {name!r} has two ids")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks, unmerged = rank_merges(vocab, merges, bool(model.get("ignore_merges")))
    ours = model.get(OURS) or {}
    if not isinstance(name := ours.get("name", "bpe"), str):
        raise ValueError(f"its name is {name!r}")
    config = dict(ours.get("config") or {})
    if bos := _bos(description.get("post_processor")):
        config |= {"bos_token": bos, "add_bos_token": True}
    return {"ranks": ranks, "pattern": from_pre_tokenizer(description.get("pre_tokenizer")), "unmerged": unmerged,
            "special_tokens": special, "added_tokens": added, "normalizer": normalizer,
            "name": name, "config": config}  # fmt: skip


def rank_merges(
    vocab: Mapping[str, int], merges: list[tuple[str, ...]], ignore_merges: bool = False
) -> tuple[dict[bytes, int], dict[int, bytes]]:
    """Tokens and merges in GPT-2's alphabet as (ranks, unmerged): {token: id} in the order of merging, single bytes
    first, and {id: bytes} of the tokens that no merge makes.

    Raises ValueError for damaged merges and for merges that ranks do not describe: merging by rank lets any two tokens
    merge into a third, so every token must come about by its own merge, and no other.
    """
    tokens = {}
    for text, i in vocab.items():
        try:
            tokens[from_printable(text)] = i
        except KeyError:
            raise ValueError(f"its token {text!r} has characters outside GPT-2's byte alphabet") from None
    if b"" in tokens:
        raise ValueError("it has a token without text")
    listed: dict[bytes, list[tuple[bytes, ...]]] = {token: [] for token in tokens if len(token) == 1}
    for token, group in itertools.groupby((tuple(map(from_printable, m)) for m in merges), key=b"".join):
        pairs = list(group)
        if listed.setdefault(token, pairs) is not pairs:
            raise ValueError(f"its token {token!r} is merged twice")
        if any(len(pair) != 2 or pair[0] not in listed or pair[1] not in listed for pair in pairs):
            raise ValueError(f"the merge of {token!r} is not of two tokens that come before it")
    if missing := next((token for token in listed if token not in tokens), None):
        raise ValueError(f"the merged token {missing!r} is not in its vocabulary")
    unmerged = {i: token for token, i in tokens.items() if token not in listed}
    order = {token: rank for rank, token in enumerate(listed)}
    if ignore_merges:  # a piece of text that is such a token becomes it without a merge
        order |= {token: len(order) + n for n, token in enumerate(unmerged.values())}
        listed |= dict.fromkeys(unmerged.values(), [])
        unmerged = {}
    for token, pairs in listed.items():
        if len(token) > 1 and find_merge(token, order) not in (pairs or [None]):
            raise ValueError(f"its token {token!r} can come about by another merge than its own")
    return {token: tokens[token] for token in listed}, unmerged


def _bos(processor: Any) -> str | None:
    """The token that a post-processor puts before a text, if it does."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_bos, processor["processors"])), None)
    first = next(iter(processor.get("single") or [{}]))
    return first.get("SpecialToken", {}).get("id")


def hugging_face_files(tokenizer, max_length: int | None = None) -> dict[str, bytes]:
    """{file name: content} with which `AutoTokenizer.from_pretrained` opens a folder and gives the same ids.

    max_length: the longest text, in tokens, that the model takes.
    """
    config = tokenizer.config() | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": max_length} if max_length else {}
    files = {"tokenizer.json": tokenizer.hugging_face_json(), "tokenizer_config.json": config}
    return {name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode() for name, value in files.items()}
