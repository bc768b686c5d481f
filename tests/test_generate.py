"""Writing texts: many at once, streams, stops, seeds, penalties, log-probabilities."""
import math

import numpy as np
import pytest
from model_variants import TINY

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.inference import Decoder, Sampling, TextStream, Writing, generate, stream
from gpt.inference.processors import largest, penalize
from gpt.text import CharTokenizer, Tokenizer

LETTERS = CharTokenizer("abcdefghijk")  # 11 ids


@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request):
    tg.manual_seed(3)
    model = GPT(GPTConfig(**TINY, position=request.param)).eval()
    with tg.no_grad():
        for p in model.parameters():
            p.add_(tg.randn(*p.shape) * 0.3)
    return model


@pytest.fixture(scope="module")
def counting():
    """A model that always says the next letter."""
    model = GPT(GPTConfig(**TINY | {"n_embd": 16}, tie_weights=False, position="none")).eval()
    with tg.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_()
        model.transformer.wte.weight.array[:] = np.eye(11, 16)
        model.lm_head.weight.array[:] = 9 * np.roll(np.eye(11), 1, axis=0) @ np.eye(11, 16)
    for p in model.parameters():
        p._bump()
    return model


PROMPTS = [[1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 0, 1, 2, 3], [2, 3, 4]]


def test_company_changes_nothing(model):
    """Each text of a batch is its solo result: prompts of all lengths, past block_size, few rows, in any order."""
    settings = {"max_new_tokens": 14, "temperature": 1.4, "top_k": 8, "presence_penalty": 0.4}
    alone = [[generate(model, prompt, **settings, seed=7 + n)[0].ids for n in range(3)] for prompt in PROMPTS]
    for max_rows in (1, 2, 5, 16):
        together = generate(model, PROMPTS, num_samples=3, max_rows=max_rows, **settings, seed=7)
        assert [writing.ids for writing in together] == [ids for samples in alone for ids in samples]
        assert {writing.finish_reason for writing in together} == {"length"}
    assert len({tuple(ids) for samples in alone[:3] for ids in samples}) == 9


def test_texts_come_and_go(model):
    decoder = Decoder(model, rows=3)
    jobs = [(PROMPTS[i % 3], Sampling(max_new_tokens=2 + 3 * i % 7, temperature=1.2, seed=i)) for i in range(9)]
    waiting, done = [Writing(prompt, settings) for prompt, settings in jobs], []
    everyone = list(waiting)
    while waiting or decoder.active:
        if waiting and decoder.free:
            pieces = decoder.add([waiting.pop(0)])
        else:
            pieces = decoder.step()
        done += [piece.writing for piece in pieces if piece.finish_reason]
        assert len(decoder.active) + decoder.free == 3
    assert sorted(map(id, done)) == sorted(map(id, everyone))
    for writing, (prompt, settings) in zip(everyone, jobs, strict=True):
        [solo] = generate(model, prompt, max_new_tokens=settings.max_new_tokens, temperature=1.2, seed=settings.seed)
        assert writing.ids == solo.ids and len(writing.ids) == settings.max_new_tokens


def test_cancel(model):
    decoder = Decoder(model, rows=2)
    first, second = (Writing(p, Sampling(seed=s, max_new_tokens=6)) for p, s in (([1, 2], 1), ([3], 2)))
    decoder.add([first, second])
    decoder.step()
    decoder.cancel(first)
    decoder.cancel(first)
    assert (first.finish_reason, len(first.ids), decoder.free) == ("cancelled", 2, 1)
    while decoder.active:
        decoder.step()
    assert second.ids == generate(model, [3], max_new_tokens=6, seed=2)[0].ids


def test_what_a_row_still_holds_is_not_read_again(model):
    """With reuse, a text that goes on from another one: the same result, and only the new tokens are read."""
    read, decode = [], model.decode

    def counted(idx, step):
        read.append(idx.size(1))
        return decode(idx, step)

    decoder = Decoder(model, rows=1, reuse=True)
    first = Writing([1, 2, 3], Sampling(max_new_tokens=2, seed=1))
    decoder.add([first])
    decoder.step()
    prompt = [1, 2, 3, first.ids[0], (first.ids[1] + 1) % 11]
    second = Writing(prompt, Sampling(max_new_tokens=3, seed=1))
    model.decode = counted
    try:
        decoder.add([second])
    finally:
        del model.decode
    while decoder.active:
        decoder.step()
    assert read == [1]
    assert second.ids == generate(model, prompt, max_new_tokens=3, seed=1)[0].ids


def test_seeds(model):
    ids = [generate(model, [1], max_new_tokens=20, seed=seed)[0].ids for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    tg.manual_seed(5)
    first = generate(model, [1], max_new_tokens=20)[0].ids
    second = generate(model, [1], max_new_tokens=20)[0].ids
    tg.manual_seed(5)
    assert generate(model, [1], max_new_tokens=20)[0].ids == first != second


def test_stops(counting):
    [text] = generate(counting, "ab", LETTERS, temperature=0, max_new_tokens=4)
    assert (text.text, text.ids, text.finish_reason) == ("cdef", [2, 3, 4, 5], "length")
    [text] = generate(counting, "ab", LETTERS, temperature=0, stop_ids=(5,))
    assert (text.text, text.ids, text.finish_reason) == ("cde", [2, 3, 4, 5], "stop")
    [text] = generate(counting, "ab", LETTERS, temperature=0, stop=("gh", "fgz", "hi"))
    assert (text.text, text.ids[-1], text.finish_reason) == ("cdef", 7, "stop")
    [text] = generate(counting, "ab", LETTERS, temperature=0, stop=("fgz",), max_new_tokens=5)
    assert (text.text, text.finish_reason) == ("cdefg", "length")  # what was held back comes at the end
    assert generate(counting, "ab", LETTERS, max_new_tokens=0)[0].text == ""
    pieces = list(stream(counting, "ab", LETTERS, temperature=0, stop=("fgz", "ij")))
    assert [piece.text for piece in pieces] == ["c", "d", "e", "", "", "fgh", "", ""]
    assert [piece.finish_reason for piece in pieces] == [None] * 7 + ["stop"]


class Bytes(Tokenizer):
    """Ids 0 to 255 are bytes, 256 ends a text."""

    kind, name, vocab_size, eot_id, special_tokens = "bytes", "bytes", 257, 256, {"<end>": 256}
    pieces = [bytes([i]) for i in range(256)] + [b"<end>"]
    to_json = from_json = hugging_face_json = None

    def _encode_ordinary(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


def test_text_comes_in_whole_characters():
    def pieces(data, *stop):
        stream = TextStream(Bytes(), stop)
        return [stream.push(i) for i in data] + [stream.finish()], stream.stopped

    assert pieces("aé€😀".encode())[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces("a€".encode()[:-1])[0] == ["a", "", "", "\ufffd"]
    assert pieces([97, 256, 300, 98])[0] == ["a", "", "", "b", ""]  # special, and of a padded vocabulary
    assert pieces(b"xaab!", "aab") == (["x", "", "", "", "", ""], True)
    assert pieces(b"aaab", "aab") == (["", "", "a", "", ""], True)
    assert pieces(b"aaac", "aab") == (["", "", "a", "aac", ""], False)
    assert pieces(b"ab", "abc", "b") == (["", "a", ""], True)
    rng = np.random.default_rng(0)
    for _ in range(200):  # whatever the stops, nothing is lost or said twice
        text, stop = ("".join(rng.choice(list("ab"), size=n)) for n in (12, 3))
        got, stopped = pieces(text.encode(), stop)
        cut = text.find(stop)
        assert "".join(got) == (text if cut < 0 else text[:cut]) and stopped == (cut >= 0)


def test_penalties_and_bias():
    logits = tg.tensor([1.0, -1.0, 2.0, 0.5])
    settings = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: -1})
    assert penalize(logits, settings, {0, 1}, {0: 3}).tolist() == [0.5 - 0.25 - 1.5, -2.0, 2.0, -0.5]
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.5]
    assert largest(tg.tensor([1.0, 3.0, 3.0, 2.0]), 3) == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert largest(logits, 9)[-1] == (1, -1.0) and largest(logits, 0) == []


def test_presence_counts_what_was_written_not_what_was_asked(counting):
    [text] = generate(counting, "c", LETTERS, temperature=0, presence_penalty=100, max_new_tokens=11)
    assert text.text == "defghijkabc"  # the c of the prompt is free, and nothing comes twice
    [text] = generate(counting, "c", LETTERS, temperature=0, logit_bias={4: -100}, max_new_tokens=3)
    assert "e" not in text.text


def test_log_probabilities(model):
    [writing] = generate(model, [4, 5], max_new_tokens=12, seed=2, temperature=2.0, top_k=3, logprobs=4)
    text = [4, 5]
    for choice in writing.choices:
        with tg.no_grad():
            if model.config.position == "rotary":
                logits = model.lm_head(model.hidden(tg.tensor([text]))[:, -1])[0]
            else:
                logits = model(tg.tensor([text[-8:]]))[0][0, 0]
            expected = tg.nn.functional.log_softmax(logits, dim=-1).numpy()  # before temperature and cuts
        assert math.isclose(choice.logprob, expected[choice.id], abs_tol=1e-4)
        assert [i for i, _ in choice.top] == np.argsort(-expected)[:4].tolist()
        text.append(choice.id)
    assert generate(model, [1], max_new_tokens=1)[0].choices[0].logprob is None


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -1}, "temperature must be at least 0"), ({"temperature": math.nan}, "temperature must be"),
    ({"top_p": 0.0}, "top_p in"), ({"min_p": 1.5}, "min_p in"), ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty must be above 0"), ({"stop": "x"}, "stop must be a sequence"),
    ({"stop": ("x",)}, "need a tokenizer"), ({"logit_bias": {11: 1}}, "token id 11 is outside"),
    ({"logprobs": -1}, "logprobs"), ({"num_samples": 0}, "num_samples"), ({"num_beams": 2, "num_samples": 3}, "beams"),
    ({"num_beams": 2, "stop": ("x",)}, "num_beams = 1"),
], ids=str)
def test_wrong_settings(model, settings, message):
    with pytest.raises(UserError, match=message):
        generate(model, [1], **settings)


def test_wrong_prompts(model):
    for prompt, message in (([], "no prompt"), ([[]], "at least one token"), ("abc", "needs a tokenizer"),
                            ([11], "outside the model's vocabulary")):
        with pytest.raises(UserError, match=message):
            generate(model, prompt, max_new_tokens=2)
    decoder = Decoder(model, rows=1, length=5)
    with pytest.raises(UserError, match="do not fit the decoder's length of 5"):
        decoder.add([Writing([1, 2], Sampling(max_new_tokens=5))])
    with pytest.raises(UserError, match="2 texts for 1 free rows"):
        decoder.add([Writing([1], Sampling(max_new_tokens=1)), Writing([2], Sampling(max_new_tokens=1))])
    assert decoder.free == 1
