"""The key-value cache: the same logits and the same text as without it, for every variant, length and batch."""
import os
from pathlib import Path

import numpy as np
import pytest
from model_variants import TINY, VARIANTS

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.model import KVCache, next_logits


def lively(name="default", **changes):
    """A variant with weights that make a difference: at the initial 0.02 attention hardly looks at anything."""
    tg.manual_seed(5)
    model = GPT(GPTConfig(**{**TINY, **VARIANTS[name], **changes})).eval()
    with tg.no_grad():
        for p in model.parameters():
            p.add_(tg.randn(*p.shape) * 0.3)
    return model


def prompts(B, T, seed=0):
    return tg.tensor(np.random.default_rng(seed).integers(11, size=(B, T)))


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_is_uncached(name):
    model = lively(name)
    for B, T, new in ((1, 1, 7), (3, 5, 3), (2, 3, 17), (1, 8, 6), (2, 13, 4)):  # 17: past block_size 8, twice around
        idx = prompts(B, T)
        slow = model.generate(idx, new, do_sample=False, use_cache=False)
        assert slow.shape == (B, T + new)
        assert model.generate(idx, new, do_sample=False).tolist() == slow.tolist()
        texts = []
        for use_cache in (True, False):
            tg.manual_seed(3)
            texts.append(model.generate(idx, new, temperature=1.5, top_k=7, top_p=0.9, use_cache=use_cache).tolist())
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_different_lengths(name):
    """Rows of a batch never influence each other: logits are those of each text alone, at every step."""
    model = lively(name).double()
    texts = [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 0, 1, 2, 3], [4, 4]]
    together, alone = KVCache(model, 4), [KVCache(model, 1) for _ in texts]
    rng = np.random.default_rng(0)
    for _ in range(12):  # the third is past block_size at once, the second after 8 steps
        logits = next_logits(model, texts, together).numpy()
        for i, text in enumerate(texts):
            np.testing.assert_allclose(logits[i], next_logits(model, [text], alone[i])[0].numpy(), atol=1e-10)
        for text in texts:
            text += rng.integers(11, size=1).tolist()


@pytest.mark.parametrize("name", ["default", "sinusoidal", "modern", "no_positions"])
def test_append_in_pieces(name):
    """A longer text, a text that was cut, a copied and a moved row continue from what the cache holds."""
    model = lively(name).double()
    text = [3, 1, 4, 1, 5, 9, 2]
    whole = next_logits(model, [text], KVCache(model, 1)).numpy()
    cache = KVCache(model, 3)
    next_logits(model, [text[:2], [7, 7, 7]], cache)
    logits = next_logits(model, [text, [7, 7, 7, 8]], cache).numpy()  # five new tokens here, one there
    np.testing.assert_allclose(logits[0], whole[0], atol=1e-10)
    np.testing.assert_allclose(logits[1], next_logits(model, [[7, 7, 7, 8]], KVCache(model, 1)).numpy()[0], atol=1e-10)
    assert cache.lengths == [7, 4, 0]
    cache.truncate(0, 3)
    np.testing.assert_allclose(next_logits(model, [text], cache).numpy(), whole, atol=1e-10)
    cache.truncate(0, 3)
    cache.copy_row(0, 2)
    np.testing.assert_allclose(next_logits(model, [text], cache, first=2).numpy(), whole, atol=1e-10)
    cache.reorder([1, 0, 1])
    assert cache.lengths == [4, 3, 4]
    np.testing.assert_allclose(next_logits(model, [text], cache, first=1).numpy(), whole, atol=1e-10)


def test_a_rolling_window_is_sliding_window_attention():
    """Against a band mask over the whole text, a long prompt included."""
    for name in ("modern", "no_positions", "qk_norm"):
        model = lively(name).double()
        text = prompts(1, 29).tolist()[0]
        with tg.no_grad():
            expected = model.lm_head(model.hidden(tg.tensor([text]))[:, -1]).numpy()
        np.testing.assert_allclose(next_logits(model, [text], KVCache(model, 1)).numpy(), expected, atol=1e-10)
        changed = [(text[0] + 1) % 11, *text[1:]]  # two layers reach 2 * 7 tokens back, not 28
        np.testing.assert_allclose(next_logits(model, [changed], KVCache(model, 1)).numpy(), expected, atol=1e-10)


def test_wrong_use_of_the_cache():
    model = lively()
    with pytest.raises(UserError, match="room for 4 tokens per row, not for 5"):
        next_logits(model, [[1] * 5], KVCache(model, 1, length=4))
    cache = KVCache(model, 1)
    next_logits(model, [[1, 2]], cache)
    with pytest.raises(UserError, match="longer than what its row"):
        next_logits(model, [[1, 2]], cache)
    with pytest.raises(UserError, match="token id 11 is outside"):
        next_logits(model, [[11]], KVCache(model, 1))


def test_nothing_is_recorded():
    model = lively()
    cache = KVCache(model, 1)
    assert not next_logits(model, [[1, 2]], cache).requires_grad and not cache.layers[0].keys.requires_grad


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which Linux has")
def test_rows_that_nobody_uses_take_no_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB

    small = lively(position="rotary")
    next_logits(small, [[1, 2, 3]], KVCache(small, rows=1))  # what is loaded at first use does not count
    model, before = lively(position="rotary", block_size=200_000), resident()
    cache = KVCache(model, rows=16)
    size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)) / 2**20
    next_logits(model, [[1, 2, 3]], cache, first=7)
    assert size > 300 and resident() - before < 50, (size, resident() - before)
