"""On a GPU: pytest -m cuda. CUDA graphs of functions, training steps and decoding steps against the same without; the
products that they go through."""

from __future__ import annotations

import numpy as np
import pytest
from test_cuda import VARIANTS, batch, counted_waits, make, numpy, poisoned  # noqa: F401

import tensorgrad as tg
from gpt.model import KVCache, graphed, next_logits
from tensorgrad.nn import functional as F
from tensorgrad.nn.utils import clip_grad_norm_

pytestmark = pytest.mark.cuda


def test_graph_replay_equals_eager():
    model = make("cuda").eval()

    def logits(idx):
        with tg.autocast("bfloat16"):
            return model.lm_head(model.hidden(idx))

    run_graph = tg.cuda.graphed(logits, batch("cuda")[0])
    for seed in range(3):
        x = batch("cuda", seed=seed)[0]
        with tg.no_grad():
            want = numpy(logits(x))
        got = numpy(run_graph(x))
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * np.abs(want).max())
        np.testing.assert_array_equal(numpy(run_graph(x)), got)
    with pytest.raises(RuntimeError, match="graphed: recorded for"):
        run_graph(batch("cuda", rows=3)[0])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_graph_of_a_training_step_equals_eager(dtype):
    found = []
    for graph in (False, True):
        model, losses = make("cuda"), []
        opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))

        def gradients(x, y, model=model):
            with tg.autocast(dtype=dtype, enabled=dtype is not None):
                loss = model(x, y)[1]
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            return loss.detach()

        step = tg.cuda.graphed_step(gradients, opt, *batch("cuda")) if graph else None
        for i in range(20):
            for group in opt.param_groups:
                group["lr"] = 1e-4 * (i + 1)
            if graph:
                losses.append(step(*batch("cuda", seed=i)).item())
            else:
                losses.append(gradients(*batch("cuda", seed=i)).item())
                opt.step()
                opt.zero_grad()
        assert {int(e["step"]) for e in opt.state_dict()["state"].values()} == {20}
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3 if dtype is None else 0.02)


@pytest.mark.filterwarnings("error:decoding goes on")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_graph_of_a_decoding_step_equals_eager(name, dtype, monkeypatch):
    """One text and several of different lengths, past block_size where a cache rolls."""
    monkeypatch.setattr(graphed, "SHORTEST", 8)
    model = make("cuda", **VARIANTS[name]).to(tg.dtypes.as_dtype(dtype)).eval()
    tolerance = 1e-4 if dtype == "float32" else 0.03
    for texts in ([[1, 2, 3]], [[4], [5, 6, 7, 8, 9], [10, 11, 12], [1, 2]]):
        caches = [KVCache(model, len(texts)) for _ in range(2)]
        for step in range(50 if caches[0].rolls else 25):
            got = next_logits(model, texts, caches[0])
            with monkeypatch.context() as patch:
                patch.setenv("TENSORGRAD_CUDA_GRAPH", "0")
                want = numpy(next_logits(model, texts, caches[1]))
            np.testing.assert_allclose(numpy(got), want, rtol=0, atol=tolerance * np.abs(want).max())
            for row, text in enumerate(texts):
                text.append((7 * step + row) % 301)
        assert len(caches[0].graphs.made) >= 3 and caches[1].graphs is None


def test_a_decoding_step_waits_for_its_token_only():
    model = make("cuda").eval()
    cache, text = KVCache(model), [1, 2, 3]
    for step in range(12):
        with counted_waits() as waits:
            token = next_logits(model, [text], cache).argmax(dim=-1)
        text.append(token.item())
        assert waits == [] or step < 4
    assert len(cache.graphs.made) == 1


def test_cublaslt_equals_cublas(monkeypatch):
    a, b = (tg.randn(256, 320).cuda().bfloat16(), tg.randn(320, 192).cuda().bfloat16())
    want = numpy(a @ b)
    monkeypatch.setenv("TENSORGRAD_CUBLASLT", "1")
    np.testing.assert_allclose(numpy(a @ b), want, rtol=0.02, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cublaslt_adds_the_bias(dtype, monkeypatch, poisoned):  # noqa: F811
    tolerance = 1e-4 if dtype == "float32" else 0.02
    rng = np.random.default_rng(0)
    for rows, width, columns in ((64, 96, 128), (33, 40, 301), (1, 768, 2304)):
        shapes, found = ((rows, width), (columns, width), columns), []
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        for use in ("0", "1"):
            monkeypatch.setenv("TENSORGRAD_CUBLASLT", use)
            tensors = [tg.tensor(a, device="cuda").to(tg.dtypes.as_dtype(dtype)).detach() for a in arrays]
            x, w, b = (t.requires_grad_() for t in tensors)
            y = F.linear(x, w, b)
            y.float().pow(2).sum().backward()
            found.append([numpy(t) for t in (y, x.grad, w.grad, b.grad)])
        for got, want in zip(found[1], found[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
