"""What pretrained models need of the model: stretched rotary positions, heads of any size, biases."""
import dataclasses
import math

import numpy as np
import pytest
from interop_tools import MODERN, logits_of, make_model

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.interop.names import skeleton
from gpt.model.positions import rotary_table, stretched_frequencies


def test_linear_stretching_divides_positions():
    cpu = tg.zeros(1).device
    plain, _ = rotary_table(8, 6, 100.0, tg.float64, cpu)
    stretched, _ = rotary_table(32, 6, 100.0, tg.float64, cpu, (4.0, None))
    np.testing.assert_allclose(stretched.numpy()[::4], plain.numpy(), atol=1e-12)


def test_llama3_stretching_by_hand():
    """Meta's rule: a wavelength above 8192 / low is stretched, below 8192 / high kept, between them interpolated."""
    config = GPTConfig(position="rotary", rope_scaling="llama3", rope_factor=8.0, rope_theta=500000.0, head_size=128)
    found = stretched_frequencies(128, 500000.0, config.rope_stretch).numpy()
    for i, frequency in enumerate(500000.0 ** (-np.arange(0, 128, 2) / 128)):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert math.isclose(found[i], expected, rel_tol=1e-12)


def test_cached_generation_with_stretched_positions_and_wide_heads():
    model = make_model(**MODERN, head_size=12, qkv_bias=True, rope_scaling="linear", rope_factor=2.0)
    ids = tg.tensor([[1, 2, 3]])
    assert (model.generate(ids, 60, temperature=0).tolist()
            == model.generate(ids, 60, temperature=0, use_cache=False).tolist())


def test_long_texts_where_the_first_table_is_short():
    model = make_model(**MODERN, block_size=5000)
    whole = logits_of(model, np.arange(4200)[None] % 97)
    assert np.isfinite(whole).all()
    assert np.abs(logits_of(model, np.arange(50)[None] % 97) - whole[:, :50]).max() < 1e-4


def test_biases_of_queries_keys_and_values_only():
    names = {name for name, _ in GPT(GPTConfig(**MODERN, n_layer=1, n_head=4, n_embd=32, vocab_size=9,
                                               qkv_bias=True)).named_parameters() if name.endswith("bias")}
    assert names == {"transformer.h.0.attn.c_attn.bias"}


@pytest.mark.parametrize("changes, message", [
    ({"rope_factor": 0.0}, "rope_factor must be above 0"),
    ({"rope_factor": math.inf}, "rope_factor must be above 0 and finite"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be one of none, linear, llama3"),
    ({"rope_scaling": "llama3", "rope_high_freq_factor": 1.0}, "must be above rope_low_freq_factor"),
    ({"head_size": 0}, "head_size must be a whole number of at least 1"),
    ({"head_size": 5, "position": "rotary"}, "must be even, not 5"),
])
def test_config_errors(changes, message):
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)
    assert message in str(error.value)


def test_a_skeleton_has_the_shapes_and_draws_no_numbers():
    config = GPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=97)
    state = tg.get_rng_state()
    shapes = {name: tuple(p.shape) for name, p in skeleton(config).named_parameters()}
    assert tg.get_rng_state() == state
    assert shapes == {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    assert tg.get_rng_state() != state


def test_old_configurations_mean_what_they_did():
    """The fields that pretrained models brought change nothing unless they are set."""
    new = {"head_size", "qkv_bias", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
           "rope_original_block_size"}
    values = {f.name: getattr(GPTConfig(), f.name) for f in dataclasses.fields(GPTConfig) if f.name not in new}
    assert GPTConfig(**values) == GPTConfig() and GPTConfig().head_dim == 64 and GPTConfig().rope_stretch is None
