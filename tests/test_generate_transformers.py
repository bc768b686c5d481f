"""Greedy, penalties, top-k, top-p, min-p and beam search against transformers, on the same weights."""
import math

import numpy as np
import pytest

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.inference import Sampling, generate
from gpt.inference.processors import penalize
from gpt.model.sampling import filter_logits

torch = pytest.importorskip("torch", reason="torch is the oracle")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle of generation")

V, T, L, H, C = 61, 48, 2, 4, 32


def gpt2():
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, attn_pdrop=0.0,
                                     embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config)
    ours = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C, bias=True, activation="gelu_tanh"))

    def weights(state):
        for name in ours.state_dict():
            value = state[name]
            conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            yield name, value.T if conv1d else value

    return theirs, ours, weights


def llama():
    config = transformers.LlamaConfig(vocab_size=V, max_position_embeddings=T, hidden_size=C, num_hidden_layers=L,
                                      num_attention_heads=H, num_key_value_heads=2, intermediate_size=48,
                                      tie_word_embeddings=False, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
                                      pad_token_id=0)
    theirs = transformers.LlamaForCausalLM(config)
    ours = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_kv_head=2, n_embd=C, ffn_dim=48,
                         position="rotary", norm="rmsnorm", activation="swiglu", tie_weights=False))

    def weights(state):
        yield "transformer.wte.weight", state["model.embed_tokens.weight"]
        yield "transformer.ln_f.weight", state["model.norm.weight"]
        yield "lm_head.weight", state["lm_head.weight"]
        for i in range(L):
            here, there = f"transformer.h.{i}.", f"model.layers.{i}."
            yield here + "ln_1.weight", state[there + "input_layernorm.weight"]
            yield here + "ln_2.weight", state[there + "post_attention_layernorm.weight"]
            q, k, v, o = (state[f"{there}self_attn.{x}_proj.weight"] for x in "qkvo")
            yield here + "attn.c_attn.weight", np.concatenate([q, k, v])
            yield here + "attn.c_proj.weight", o
            gate, up, down = (state[f"{there}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
            yield here + "mlp.c_fc.weight", np.concatenate([gate, up])
            yield here + "mlp.c_proj.weight", down

    return theirs, ours, weights


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["gpt2", "llama"])
def pair(request):
    torch.manual_seed(1)
    theirs, ours, weights = request.param()
    with torch.no_grad():
        for p in theirs.parameters():  # initial weights repeat one token for ever
            p.add_(torch.randn_like(p) * 0.15)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: tg.tensor(np.ascontiguousarray(value)) for name, value in weights(state)})
    return theirs.double().eval(), ours.double().eval()


PROMPTS = [[5], [7, 8, 9], [11, 3, 60, 2, 2, 40, 17, 8, 9, 30]]


def hf(model, prompt, new=20, **options):
    options = {"do_sample": False, "eos_token_id": None} | options
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, return_dict_in_generate=True,
                         output_scores=True, pad_token_id=1, **options)
    return out.sequences[0, len(prompt):].tolist(), out


def test_greedy(pair):
    theirs, ours = pair
    together = generate(ours, PROMPTS, max_new_tokens=20, temperature=0)
    for prompt, writing in zip(PROMPTS, together, strict=True):
        assert writing.ids == hf(theirs, prompt)[0]
        idx = tg.tensor([prompt])
        assert ours.generate(idx, 20, do_sample=False)[0].tolist() == prompt + writing.ids


def test_greedy_and_beams_in_float32(pair):
    """float32 is what runs in practice, where there is Numba in compiled decoding kernels."""
    theirs, double = pair
    ours = GPT(double.config)
    ours.load_state_dict(double.state_dict())
    ours.eval()
    found = generate(ours, PROMPTS, max_new_tokens=20, temperature=0)
    assert [writing.ids for writing in found] == [hf(theirs, prompt)[0] for prompt in PROMPTS]
    for prompt in PROMPTS:
        [best] = generate(ours, prompt, max_new_tokens=12, num_beams=3)
        assert best.ids == hf(theirs, prompt, 12, num_beams=3)[0]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(pair, penalty):
    theirs, ours = pair
    plain = [hf(theirs, prompt)[0] for prompt in PROMPTS]
    expected = [hf(theirs, prompt, repetition_penalty=penalty)[0] for prompt in PROMPTS]
    assert expected != plain
    found = generate(ours, PROMPTS, max_new_tokens=20, do_sample=False, repetition_penalty=penalty)
    assert [writing.ids for writing in found] == expected


def test_bias(pair):
    theirs, ours = pair
    bias = {7: 2.5, 30: -4.0, 60: 1.5}
    for prompt in PROMPTS:
        expected = hf(theirs, prompt, sequence_bias={(i,): b for i, b in bias.items()})[0]
        assert generate(ours, prompt, max_new_tokens=20, temperature=0, logit_bias=bias)[0].ids == expected


@pytest.mark.parametrize("options", [
    {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_p": 0.05}, {"min_p": 0.2}, {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.4},
], ids=str)
def test_what_is_drawn_from(pair, options):
    """transformers draws a text; at each of its steps we would have drawn from the same distribution."""
    theirs, ours = pair
    prompt = PROMPTS[2]
    torch.manual_seed(2)
    options = {"top_k": 0} | options
    drawn, out = hf(theirs, prompt, do_sample=True, **options)
    options["top_k"] = options["top_k"] or None
    settings = Sampling(**options)
    cuts = 0
    for i, scores in enumerate(out.scores):
        text = prompt + drawn[:i]
        with tg.no_grad():
            logits = penalize(ours(tg.tensor([text]))[0][0, 0], settings, set(text), {})
            kept = filter_logits(logits.unsqueeze(0), settings.temperature, settings.top_k, settings.top_p,
                                 settings.min_p)[0].numpy()
        expected = scores[0].double().numpy()
        assert np.array_equal(np.isfinite(kept), np.isfinite(expected))
        np.testing.assert_allclose(kept, expected, atol=1e-4)  # theirs are float32
        cuts += int(np.isinf(kept).sum())
    assert cuts > 0 or set(options) == {"top_k", "temperature"}


@pytest.mark.parametrize("options", [
    {"num_beams": 4}, {"num_beams": 3, "length_penalty": 0.0}, {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0}, {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "repetition_penalty": 1.5},
], ids=str)
@pytest.mark.parametrize("stops", [(), (9,), (9, 30, 41, 2)], ids=len)
def test_beam_search(pair, options, stops):
    theirs, ours = pair
    for prompt in PROMPTS:
        n = options["num_beams"]
        _, out = hf(theirs, prompt, 12, num_return_sequences=n, eos_token_id=list(stops) or None, **options)
        found = generate(ours, prompt, max_new_tokens=12, num_samples=n, stop_ids=stops, **options)
        for row, score, writing in zip(out.sequences.tolist(), out.sequences_scores.tolist(), found, strict=True):
            assert row[len(prompt):len(prompt) + len(writing.ids)] == writing.ids
            assert set(row[len(prompt) + len(writing.ids):]) <= {1}  # padding
            assert math.isclose(writing.score, score, rel_tol=1e-4)
            assert writing.finish_reason == ("stop" if writing.ids[-1] in stops else "length")
