"""Looking inside: attention maps, logit lens and losses against the model's own numbers and definitions."""
import math

import numpy as np
import pytest
from model_variants import TINY, VARIANTS

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.inspect import (
    attention_figure,
    attention_map,
    attention_maps,
    inspect_text,
    logit_lens,
    next_tokens,
    show_token,
    table,
    text_losses,
    token_losses,
    write_pngs,
)
from gpt.text import CharTokenizer
from gpt.text.tokenizers import SentencePieceTokenizer

LETTERS = CharTokenizer("\n abcdefghi")  # 11 ids


def lively(name):
    tg.manual_seed(5)
    model = GPT(GPTConfig(**{**TINY, **VARIANTS[name]})).double().eval()
    with tg.no_grad():
        for p in model.parameters():
            p.add_(tg.randn(*p.shape, dtype=tg.float64) * 0.3)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_are_what_attention_used(name):
    """Rows are distributions over the past, and with them the values give what attention passes on."""
    model = lively(name)
    idx = tg.tensor(np.random.default_rng(0).integers(11, size=(2, 7)))
    passed_on = []
    handles = [block.attn.c_proj.register_forward_pre_hook(lambda module, args: passed_on.append(args[0]))
               for block in model.transformer.h]
    with tg.no_grad():
        model(idx)
    for handle in handles:
        handle.remove()
    values = []
    handles = [block.attn.c_attn.register_forward_hook(lambda module, args, out: values.append(out))
               for block in model.transformer.h]
    maps = attention_maps(model, idx)
    for handle in handles:
        handle.remove()
    attn = model.transformer.h[0].attn
    nh, nkv, hs = attn.n_head, attn.n_kv_head, attn.head_dim
    for layer, found in enumerate(maps):
        found = found.numpy()
        assert found.shape == (2, nh, 7, 7) and np.array_equal(found, np.tril(found))
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
        v = values[2 * layer].numpy()[..., -nkv * hs:].reshape(2, 7, nkv, hs).repeat(nh // nkv, axis=2)
        expected = np.einsum("bhts,bshd->bthd", found, v).reshape(2, 7, nh * hs)
        np.testing.assert_allclose(passed_on[layer].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["default", "post_norm", "modern", "untied"])
def test_lens_and_losses(name):
    model = lively(name)
    idx = tg.tensor(np.random.default_rng(0).integers(11, size=(2, 7)))
    with tg.no_grad():
        targets = tg.cat([idx[:, 1:], tg.full((2, 1), -100)], dim=1)
        logits, loss = model(idx, targets)
    lens = logit_lens(model, idx)
    assert len(lens) == 2 and not np.allclose(lens[0].numpy(), lens[1].numpy())
    np.testing.assert_allclose(lens[-1].numpy(), logits.numpy(), atol=1e-12)
    losses = token_losses(model, idx)
    assert losses.shape == (2, 6) and math.isclose(losses.mean().item(), loss.item(), rel_tol=1e-12)
    short = GPT(GPTConfig(**{**TINY, **VARIANTS[name], "n_layer": 1})).double().eval()  # the lens at layer 0
    state = model.state_dict()
    short.load_state_dict({key: state[key] for key in short.state_dict()})
    with tg.no_grad():
        np.testing.assert_allclose(lens[0].numpy(), short(idx, targets)[0].numpy(), atol=1e-12)


def test_inspect_text():
    model = lively("modern").train()
    seen = inspect_text(model, LETTERS, "abc de\n", top=3)
    assert model.training and seen.pieces == ["a", "b", "c", "\u2423", "d", "e", "\\n"]
    idx = tg.tensor([seen.ids])
    np.testing.assert_allclose(seen.losses, token_losses(model, idx).numpy()[0], rtol=1e-9)
    with tg.no_grad():
        probabilities = tg.nn.functional.softmax(logit_lens(model, idx)[-1], dim=-1).numpy()[0]
    for t, found in enumerate(seen.alternatives):
        best = np.argsort(-probabilities[t])[:3]
        assert [i for i, _ in found] == best.tolist()
        np.testing.assert_allclose([p for _, p in found], probabilities[t][best], rtol=1e-9)
    for t, rank in enumerate(seen.ranks):
        assert rank == (probabilities[t] > probabilities[t][seen.ids[t + 1]]).sum()
    assert len(list(table(seen, LETTERS))) == 9
    one = inspect_text(model, LETTERS, [3])
    assert len(one.losses) == 0 and one.ranks == [] and len(list(table(one, LETTERS))) == 2
    for wrong in ("", "abcdefghi"):
        with pytest.raises(UserError, match="give 1 to 8"):
            inspect_text(model, LETTERS, wrong)


def test_show_token():
    """As within a text, whatever a tokenizer drops at its beginning; control characters and bytes are spelled."""
    pieces = SentencePieceTokenizer({"\u2581": 256, "a": 257, "\u2581a": 258}, {256: -3, 257: -2, 258: -1}, range(256),
                                    {"<s>": 260})
    assert [show_token(pieces, i) for i in (258, 257, 0xE2, 10, 9, 260, 259, 300)] == [
        "\u2423a", "a", "\\xe2", "\\n", "\\t", "<s>", "[259]", "[300]"]
    assert show_token(LETTERS, 11) == "[11]" and show_token(LETTERS, 0) == "\\n"


@pytest.mark.parametrize("name", ["modern", "post_norm"])
def test_attention_map(name):
    model = lively(name)
    maps = inspect_text(model, LETTERS, "abc de").attention
    ids = LETTERS.encode("abc de")
    for layer, head, expected in ((1, 1, maps[1][1]), (0, None, maps[0].mean(0)), (None, 1, (maps[0] + maps[1])[1] / 2),
                                  (None, None, np.mean(maps, axis=(0, 1)))):
        np.testing.assert_allclose(attention_map(model, ids, layer, head), expected, rtol=1e-12)
    with pytest.raises(UserError, match="no layer 2, head None: the model has layers 0 to 1 and heads 0 to "):
        attention_map(model, ids, 2)


def test_long_texts_are_read_in_parts(monkeypatch):
    """The numbers do not depend on how many positions the head reads at a time."""
    model = lively("modern")
    whole = inspect_text(model, LETTERS, "abc de\n", top=3)
    for positions in (1, 3):
        monkeypatch.setattr("gpt.inspect._LOGITS_AT_ONCE", positions * 11)
        parts = inspect_text(model, LETTERS, "abc de\n", top=3)
        np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-12)
        assert parts.ranks == whole.ranks
        for ours, theirs in zip(sum(parts.lens, []), sum(whole.lens, []), strict=True):
            assert [i for i, _ in ours] == [i for i, _ in theirs]


@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_losses_of_long_texts(positions, monkeypatch):
    """Each token as predicted from the window that is said; no token from less than half a window."""
    model = lively("modern").train()
    monkeypatch.setattr("gpt.inspect._LOGITS_AT_ONCE", positions * 11)
    ids = np.random.default_rng(0).integers(11, size=21).tolist()              # block_size is 8
    losses, ranks, starts = text_losses(model, ids)
    assert model.training and len(losses) == len(ranks) == len(starts) == 20 and starts[0] == 0 and starts[8] == 4
    for i, start in enumerate(starts):
        assert min(i + 1, 4) <= i + 1 - start <= 8
        with tg.no_grad():
            logits = model.eval()(tg.tensor([ids[start:i + 1]]))[0][0, 0]
        logprobs = tg.nn.functional.log_softmax(logits, dim=-1).numpy()
        np.testing.assert_allclose(losses[i], -logprobs[ids[i + 1]], rtol=1e-9)
        assert ranks[i] == (logprobs > logprobs[ids[i + 1]]).sum()
    np.testing.assert_allclose(losses[:7], inspect_text(model, LETTERS, ids[:8]).losses, rtol=1e-9)
    assert text_losses(model, [3]) == ([], [], [])


SETTINGS = [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 0},
            {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_next_tokens(settings):
    """Against the definitions, written down in NumPy token by token."""
    model = lively("modern")
    ids = LETTERS.encode("abc d")
    with tg.no_grad():
        logits = model(tg.tensor([ids]))[0].numpy()[0, 0]
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
    temperature = settings.get("temperature", 1)
    warm = softmax(logits / temperature) if temperature else softmax(logits)
    order, cut_by = list(np.argsort(-logits)), {}
    if temperature == 0:
        cut_by = dict.fromkeys(order[1:], "greedy")
    left = [i for i in order if i not in cut_by]
    cut_by |= dict.fromkeys(left[settings.get("top_k", 11):], "top_k")
    left = left[:settings.get("top_k", 11)]
    share, reached, enough = warm[left] / warm[left].sum(), 0.0, []
    for i, p in zip(left, share, strict=True):
        if reached < settings.get("top_p", 1):
            enough.append(i)
        else:
            cut_by[i] = "top_p"
        reached += p
    left = [i for i in enough if warm[i] >= settings.get("min_p", 0) * warm[enough[0]]]
    cut_by |= dict.fromkeys(set(enough) - set(left), "min_p")

    seen = next_tokens(model, ids, top=11, **settings)
    assert [i for i, *_ in seen.tokens] == order and seen.kept == len(left) and seen.rank is None
    for i, p, drawn, cut in seen.tokens:
        assert cut == cut_by.get(i)
        np.testing.assert_allclose(p, softmax(logits)[i], rtol=1e-9)
        np.testing.assert_allclose(drawn, warm[i] / warm[left].sum() if i in left else 0, rtol=1e-9)
    for name, (count, mass) in seen.cuts.items():
        out = [i for i in cut_by if cut_by[i] == name]
        assert count == len(out)
        np.testing.assert_allclose(mass, warm[out].sum(), rtol=1e-9)
    assert set(seen.cuts) == set(cut_by.values())


def test_next_tokens_tells_about_a_token():
    model = lively("default")
    seen = next_tokens(model, LETTERS.encode("abc d"), top=2, token=7)
    ranked = [i for i, *_ in next_tokens(model, LETTERS.encode("abc d"), top=11).tokens]
    assert seen.rank == ranked.index(7) and {i for i, *_ in seen.tokens} == {*ranked[:2], 7}
    with tg.no_grad():  # a text that is longer than the window counts as when it is written
        long = LETTERS.encode("abcdefghi abc")
        written = model.generate(tg.tensor([long]), 1, temperature=0)[0, -1].item()
    assert next_tokens(model, long, top=1).tokens[0][0] == written
    for wrong in ({"token": 11}, {"temperature": -1}, {"top_k": 0}, {"top_p": 1.5}):
        with pytest.raises(UserError):
            next_tokens(model, [1], **wrong)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    model = lively("modern")
    seen = inspect_text(model, LETTERS, "abc de")
    paths = write_pngs(seen, LETTERS, tmp_path / "a" / "b", heads=[(1, 0), (None, 3), (0, None)])
    assert {path.name for path in paths} == {"attention.png", "lens.png", "losses.png", "attention_L1H0.png",
                                             "attention_LallH3.png", "attention_L0Hall.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for layer, head, expected in ((1, 2, seen.attention[1][2]), (0, None, seen.attention[0].mean(0)),
                                  (None, None, np.mean(seen.attention, axis=(0, 1)))):
        image = attention_figure(seen, layer, head).axes[0].images[0].get_array()
        np.testing.assert_allclose(np.asarray(image), expected, rtol=1e-12)
    for wrong in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(UserError, match="layers 0 to 1 and heads 0 to 3"):
            write_pngs(seen, LETTERS, tmp_path, [wrong])
    alone = inspect_text(model, LETTERS, "a")
    assert {path.name for path in write_pngs(alone, LETTERS, tmp_path)} == {"attention.png", "lens.png"}
