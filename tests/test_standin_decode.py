"""The decoding step as a CUDA graph, on the stand-in: the modules' logits at every position, nothing from the host but
the ids, no waiting, and what is exchanged, observed or cannot be recorded is noticed."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import standin
from model_variants import VARIANTS
from standin_device import kernels  # noqa: F401
from standin_graphs import Machine
from test_generate_cache import lively

import tensorgrad as tg
from gpt.inference import Decoder, Sampling, Writing
from gpt.model import KVCache, graphed, next_logits
from gpt.model.lora import LoRAConfig, inject, merge, set_adapters, set_scale, unmerge
from tensorgrad import nn

TEXTS = [1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1]


@pytest.fixture
def machine(kernels, monkeypatch):  # noqa: F811
    """A Machine for the caches that are appended to its list `caches`; the smallest graphs reach 4 positions."""
    def arrays():
        return [tensor.array for cache in found.caches for layer in cache.layers
                for tensor in (layer.keys, layer.values)]

    def keep():
        kept = [(cache, list(cache.lengths)) for cache in found.caches]

        def put_back():
            for cache, lengths in kept:
                cache.lengths[:] = lengths

        return put_back

    monkeypatch.setattr(graphed, "SHORTEST", 4)
    found = Machine(monkeypatch, arrays, keep)
    found.caches = []
    found.launches = lambda: sum(graph.launches for graph in found.graphs)
    found.plain = lambda *arguments: _plain(monkeypatch, *arguments)
    return found


def _plain(monkeypatch, *arguments):
    """What the modules compute."""
    with monkeypatch.context() as patch:
        patch.setenv("TENSORGRAD_CUDA_GRAPH", "0")
        return next_logits(*arguments).cpu().numpy()


def same(got, want, tolerance=3e-5):
    """Sums of float32 are some 5e-6 of the largest logit off."""
    np.testing.assert_allclose(got.cpu().float().numpy(), want.astype(np.float32), rtol=0,
                               atol=tolerance * np.abs(want).max())


def decode(machine, model, texts, steps, tolerance=3e-5):
    """Both ways, token by token; the caches must hold the same too."""
    texts = [list(text) for text in texts]
    caches = machine.caches[:] = KVCache(model, len(texts) + 1), KVCache(model, len(texts) + 1)
    for step in range(steps):
        logits = next_logits(model, texts, caches[0], 1)
        same(logits, machine.plain(model, texts, caches[1], 1), tolerance)
        assert caches[0].lengths == caches[1].lengths
        for text in texts:
            text.append((7 * step + text[-1]) % 11)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        same(mine.keys, theirs.keys.cpu().numpy(), tolerance)
        same(mine.values, theirs.values.cpu().numpy(), tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_modules(name, machine):
    """One text, then three of different lengths, past block_size: in a ring where positions are relative."""
    model = lively(name, block_size=16).to("cuda")
    for rows in (1, 3):
        decode(machine, model, TEXTS[:rows], 22)
    assert {graph.outputs[0].shape[0] for graph in machine.graphs} == {1, 3}
    assert machine.launches() > 10 and machine.host_copies == []


def test_bfloat16_weights(machine):
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    for name in ("bias", "modern"):
        decode(machine, lively(name, block_size=16).to(tg.bfloat16).to("cuda"), TEXTS[:2], 12, tolerance=0.03)
    assert machine.launches() > 10 and machine.host_copies == []


@pytest.mark.parametrize("name", ["default", "modern"])
def test_text_is_that_without_a_cache(name, machine):
    model = lively(name, block_size=32).to("cuda")
    idx = tg.tensor([[1, 2, 3], [4, 5, 6]], device="cuda")
    assert (model.generate(idx, 40, temperature=0).tolist()
            == model.generate(idx, 40, temperature=0, use_cache=False).tolist())
    assert len(machine.graphs) >= 3, "each reaches twice as far as the one before"


def test_a_step_sends_the_ids_and_waits_for_nothing(machine):
    model = lively("modern", block_size=64).to("cuda")
    cache, texts = KVCache(model, 2), [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]
    for step in range(8):
        del machine.copies[:]
        with standin.counting() as waits:
            next_logits(model, texts, cache)
        if step > 3:  # after the prompts, two steps, and one that was recorded
            assert waits == [] and [np.shape(copy) for copy in machine.copies] == [(2, 1)]
        for text in texts:
            text.append(step)
    assert machine.launches() == 5 and len(machine.graphs) == 1
    cache.truncate(0, 10)                                                      # positions other than the GPU expects
    cache.copy_row(0, 1)
    del texts[0][11:]
    texts[1][:] = texts[0]
    same(next_logits(model, texts, cache)[1:], machine.plain(model, texts[:1], KVCache(model, 1)))
    assert machine.launches() == 6


@pytest.mark.parametrize("mode", [False, True])
def test_algorithms_of_products_are_not_chosen_by_time(mode, machine, monkeypatch):
    seen, record = [], tg.cuda.graphed
    monkeypatch.setattr(tg.cuda, "graphed", lambda *arguments: (
        seen.append(tg.are_deterministic_algorithms_enabled()), record(*arguments))[1])
    tg.use_deterministic_algorithms(mode)
    try:
        decode(machine, lively(block_size=16).to("cuda"), TEXTS[2:], 5)
        assert seen == [True] and tg.are_deterministic_algorithms_enabled() == mode
    finally:
        tg.use_deterministic_algorithms(False)


def test_logits_stay(machine):
    """Those of one step are not overwritten by the next."""
    model = lively(block_size=16).to("cuda")
    cache, text, found = KVCache(model, 1), [1, 2, 3, 4, 5, 6, 7], []
    for token in (8, 9, 10, 1, 2, 3):
        text.append(token)
        found.append(next_logits(model, [text], cache))
    assert machine.launches() == 3
    for i, logits in enumerate(found):
        same(logits, machine.plain(model, [text[:8 + i]], KVCache(model, 1)))


def test_recorded_at_the_third_step_in_a_row_and_few_kept(machine):
    model = lively("modern", block_size=64).to("cuda")
    cache, texts = KVCache(model, 12), [[1] * 5 for _ in range(12)]

    def steps(rows, count):
        for _ in range(count):
            for text in texts[:rows]:
                text.append(2)
            next_logits(model, texts[:rows], cache)

    next_logits(model, texts, cache)
    for rows in (1, 2, 1, 2):
        steps(rows, 1)
    assert machine.graphs == []
    steps(1, 3)
    assert len(machine.graphs) == machine.launches() == 1
    for row in range(12):
        cache.truncate(row, 5)
        del texts[row][5:]
    first = weakref.ref(cache.graphs)
    for rows in range(2, 11):
        cache.truncate(0, 5)
        for row in range(rows):
            cache.truncate(row, 5)
            del texts[row][5:]
        steps(rows, 3)
    assert len(machine.graphs) == 10 and len(first().made) == graphed.KEPT


def test_memory_is_given_back_at_once(machine):
    gc.collect()
    gc.disable()
    try:
        model = lively("modern").to("cuda")
        model.generate(tg.tensor([[1, 2]], device="cuda"), 2)
        before = len(standin.alive)
        for _ in range(3):
            model.generate(tg.tensor([[1, 2]], device="cuda"), 10, temperature=0)
            machine.graphs.clear()
            assert len(standin.alive) <= before + 4
    finally:
        gc.enable()


def test_notices_what_is_exchanged(machine):
    model = lively("modern", block_size=64).to("cuda")
    caches = machine.caches[:] = KVCache(model, 1), KVCache(model, 1)
    text = [1, 2, 3, 4]

    def steps(new, launched=True, count=3):
        """`new`: is another graph recorded?"""
        graphs, launches = len(machine.graphs), machine.launches()
        for cache in caches:
            cache.truncate(0)
        del text[4:]
        next_logits(model, [text], caches[0])
        machine.plain(model, [text], caches[1])
        for _ in range(count):
            text.append(len(text))
            same(next_logits(model, [text], caches[0]), machine.plain(model, [text], caches[1]))
        assert (len(machine.graphs) - graphs, machine.launches() > launches) == (new, launched)

    steps(True)
    steps(False)
    model.lm_head.weight.data = model.lm_head.weight.data * 2                   # another array
    steps(True)
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(-1)                        # the same one, changed
    steps(False)
    inject(model, LoRAConfig(r=2, target_modules="all-linear"))
    model.eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data = tg.randn(*p.shape, device="cuda")
    steps(True)
    set_scale(model, 0.5)
    steps(True)
    set_adapters(model, ["default"])                                            # as they are already
    steps(False)
    set_adapters(model, [])
    steps(True)
    set_adapters(model, ["default"])
    merge(model)
    steps(True)
    unmerge(model)
    steps(True)
    with tg.autograd.profile():                                                 # somebody looks at the operations
        steps(False, launched=False)
    handle = model.transformer.h[0].attn.register_forward_hook(lambda *_: None)
    steps(False, launched=False)
    handle.remove()
    model.transformer.h[0].attn._forward_hooks = None
    steps(True)
    tg.set_float32_matmul_precision("high")
    steps(True)
    tg.set_float32_matmul_precision("highest")
    steps(False)
    model.transformer.h[0].ln_1 = nn.RMSNorm(16).to("cuda").eval()
    steps(True)
    model.train()
    steps(False, launched=False)
    model.eval()
    with tg.autocast("bfloat16"):
        graphs = len(machine.graphs)
        for _ in range(4):
            text.append(1)
            next_logits(model, [text], caches[0])
        assert len(machine.graphs) == graphs


def test_another_model_on_the_same_cache(machine):
    first, second = lively("modern").to("cuda"), lively("modern").to("cuda")
    second.lm_head.weight.data.mul_(-1)
    cache = KVCache(first, 1)
    for number, model in enumerate((first, second, first), 1):
        cache.truncate(0)
        for end in range(4, 9):
            logits = next_logits(model, [[*range(end)]], cache)
        same(logits, machine.plain(model, [[*range(8)]], KVCache(model, 1)))
        assert len(machine.graphs) == number


def test_what_cannot_be_recorded_is_told_once(machine):
    model = lively().double().to("cuda")                                       # CuPy's products, which refuse
    with pytest.warns(UserWarning, match="without a CUDA graph, which cannot be recorded: calling cuBLAS") as told:
        decode(machine, model, TEXTS[:1], 8)
        decode(machine, model, TEXTS[:1], 8)
    assert len(told) == 1 and machine.launches() == 0 and gc.isenabled()
    decode(machine, lively().to("cuda"), TEXTS[:1], 8)
    assert machine.launches()


def test_switched_off(machine, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CUDA_GRAPH", "0")
    decode(machine, lively().to("cuda"), TEXTS[:1], 8)
    assert machine.graphs == []


def test_ids_out_of_range_are_reported(machine):
    model = lively().to("cuda")
    cache, text = KVCache(model, 1), [1, 2, 3, 4]
    for token in (5, 6, 7, 99):
        next_logits(model, [text], cache)
        text.append(token)
    with pytest.raises(IndexError, match="embedding: id 99"):
        next_logits(model, [text], cache).tolist()
    assert machine.launches() == 2


def test_texts_that_come_and_go(machine):
    """The decoder writes what it writes on a CPU."""
    found = []
    for device in ("cpu", "cuda"):
        model = lively("modern", block_size=32).to(device)
        decoder = Decoder(model, rows=3)
        writings = [Writing(text, Sampling(max_new_tokens=6 + 5 * n, temperature=0)) for n, text in enumerate(TEXTS)]
        decoder.add(writings[:2])
        for _ in range(4):
            decoder.step()
        decoder.add(writings[2:])
        while decoder.active:
            decoder.step()
        found.append([writing.ids for writing in writings])
    assert found[0] == found[1] and len(machine.graphs) >= 3
