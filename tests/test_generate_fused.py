"""The compiled decoding step gives the logits of the modules, for every variant and storage, and notices changes."""
import tracemalloc

import numpy as np
import pytest
from kernel_oracle import use_threads
from model_variants import VARIANTS
from test_generate_cache import lively

import tensorgrad as tg
from gpt.inference import Decoder, Sampling, Writing
from gpt.inference.processors import Sampler, shortlist
from gpt.model import KVCache, gpt, next_logits
from gpt.model.fused import fused_step
from gpt.model.lora import LoRAConfig, inject, merge, set_adapters, unmerge
from gpt.model.sampling import filter_logits
from tensorgrad import nn

pytest.importorskip("numba", reason="needs the extra fast")
pytestmark = pytest.mark.skipif(tg.kernels.LEVEL not in ("fast", "numba"), reason="compiled kernels are switched off")
KINDS = (("float32", 1), ("float32", 3), ("turned", 2), ("bfloat16", 2), ("int8", 3))
TEXTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3, 3], [2])


@pytest.fixture
def used(monkeypatch):
    """A list that grows with every step that the compiled kernels have done."""
    done = []

    def counted(*arguments):
        logits = fused_step(*arguments)
        done.extend([logits] * (logits is not None))
        return logits

    monkeypatch.setattr(gpt, "fused_step", counted)
    return done


def plain(monkeypatch, *arguments):
    """What the modules compute."""
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "fused_step", lambda *_: None)
        return next_logits(*arguments).numpy()


def same(got, want):
    """Of the largest logit either is some 5e-6 off what float64 gives, as lively weights make of float32's 6e-8."""
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("storage, threads", KINDS)
def test_equals_the_modules(name, storage, threads, used, monkeypatch):
    """Rows of different lengths, first one by one, then together, past block_size."""
    use_threads(monkeypatch, threads)
    model = lively(name, n_embd=64, n_head=4, vocab_size=4099, ffn_dim=131)
    if storage == "turned":  # as weights of GPT-2's files lie in memory
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.weight.data = tg.from_numpy(np.asfortranarray(layer.weight.detach().numpy()))
    elif storage != "float32":
        nn.quantize(model, storage)
    monkeypatch.setattr("tensorgrad.nn.decoding.GRAIN", 64)  # several threads for small matrices too
    for rows in (1, 2, 5):
        texts, caches = [list(text) for text in TEXTS[:rows]], (KVCache(model, rows), KVCache(model, rows))
        for step in range(11):
            same(next_logits(model, texts, caches[0]).numpy(), plain(monkeypatch, model, texts, caches[1]))
            assert caches[0].lengths == caches[1].lengths
            for text in texts:
                text.append((7 * step + text[-1]) % 11)
    assert bool(used) == (model.config.norm_position == "pre")


def test_notices_what_is_exchanged(used, monkeypatch):
    model = lively("modern", n_embd=64)
    cache, other = KVCache(model, 1), KVCache(model, 1)
    text = [1, 2]

    def step(fused):
        del used[:]
        text.append(len(text) % 11)
        if len(text) > 6:
            del text[2:]
            cache.truncate(0), other.truncate(0)
            next_logits(model, [text], cache), next_logits(model, [text], other)
            text.append(5)
        same(next_logits(model, [text], cache).numpy(), want := plain(monkeypatch, model, [text], other))
        assert bool(used) == fused
        return want

    next_logits(model, [text], cache), next_logits(model, [text], other)
    step(True)
    model.lm_head.weight.data = model.lm_head.weight.data * 2                   # another array
    step(True)
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(-1)                        # the same one, changed
    step(True)
    inject(model, LoRAConfig(r=2, target_modules="all-linear"))
    for p in model.parameters():
        if p.requires_grad:
            p.data = tg.randn(*p.shape)
    step(False)
    merge(model)
    step(True)
    unmerge(model)
    step(False)
    set_adapters(model, [])
    step(True)
    set_adapters(model, ["default"])
    step(False)
    set_adapters(model, [])
    with tg.autograd.profile():                                                 # somebody looks at the operations
        step(False)
    calls = []
    for module in (model.lm_head, model.transformer.h[1], model.transformer.h[0].attn):
        handle = module.register_forward_pre_hook(lambda module, arguments: calls.append(module))
        step(False)
        assert module in calls
        handle.remove()
        step(False)                                                             # there may be another one soon
        module._forward_pre_hooks = None
    nn.quantize(model, "int8")
    step(True)
    model.transformer.h[0].ln_1 = nn.RMSNorm(64)
    step(True)


def test_what_it_is_not_for(used):
    for change in ("double", "train"):
        model = getattr(lively("default"), change)()
        cache = KVCache(model, 1)
        next_logits(model, [[1, 2]], cache)
        next_logits(model, [[1, 2, 3]], cache)
        assert not used
    model = lively("default")
    cache = KVCache(model, 17)
    next_logits(model, [[1, 2]] * 17, cache)
    next_logits(model, [[1, 2, 3]] * 17, cache)
    assert not used
    next_logits(model, [[1, 2, 3, 4]] * 16, cache)
    assert len(used) == 1


def test_the_decoder_uses_it(used):
    model = lively("modern")
    decoder = Decoder(model, rows=4)
    decoder.add([Writing(text, Sampling(max_new_tokens=3 + n, seed=n)) for n, text in enumerate(TEXTS[:4])])
    steps = 0
    while decoder.active:
        decoder.step()
        steps += 1
    assert len(used) == steps == 5


def test_a_shortlist_changes_no_draw():
    """Drawing among the top_k alone is drawing from what filter_logits leaves of all."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=500).astype(np.float32)
    logits[rng.integers(0, 500, 200)] = 1.25                                   # ties at the edge stay together
    logits = tg.tensor(logits)
    for top_k, rest in ((1, {}), (7, {}), (40, {"top_p": 0.8}), (150, {"min_p": 0.3}), (499, {}), (500, {})):
        whole = filter_logits(logits.unsqueeze(0), 0.7, top_k, **rest)[0].numpy()
        ids, among = shortlist(logits, top_k)
        kept = filter_logits(among.unsqueeze(0), 0.7, top_k, **rest)[0].numpy()
        ids = np.arange(500) if ids is None else ids
        np.testing.assert_array_equal(ids[np.isfinite(kept)], np.flatnonzero(np.isfinite(whole)))
        np.testing.assert_array_equal(kept[np.isfinite(kept)], whole[np.isfinite(whole)])
        probabilities = np.exp(whole - whole.max())
        probabilities /= probabilities.sum()
        sampler = Sampler(Sampling(temperature=0.7, top_k=top_k, seed=1, **rest))
        drawn = np.bincount([sampler.choose(logits).id for _ in range(400)], minlength=500) / 400
        assert np.abs(drawn - probabilities).max() < 5 * np.sqrt(probabilities.max() / 400)


def test_a_step_keeps_and_takes_nothing():
    """A step asks for no memory but the logits' and crumbs, and leaves none behind."""
    model = lively("modern", n_embd=64, vocab_size=4099, block_size=512)
    cache, text = KVCache(model, 2), [[1, 2, 3], [4, 5]]

    def step():
        for row in text:
            row.append(7)
        next_logits(model, text, cache)

    next_logits(model, text, cache)
    for _ in range(20):
        step()
    tracemalloc.start()
    try:
        step()
        before, peak = tracemalloc.get_traced_memory()[0], []
        for _ in range(100):
            tracemalloc.reset_peak()
            step()
            peak.append(tracemalloc.get_traced_memory()[1] - before)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 4 * 2 * 4099 <= max(peak) < 4 * 2 * 4099 + 30_000                   # bytes of (2, 4099) float32
    assert after - before < 100 * 300                                          # Python keeps some hundred freed tuples
