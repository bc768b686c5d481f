"""The published weights of reference system 0: its loss, with and without its LoRA matrices, and conversion."""
import zipfile

import numpy as np
import pytest
from interop_tools import logits_of
from text_data import data_file

import tensorgrad as tg
from gpt.cli import convert_model
from gpt.errors import UserError
from gpt.interop import load, load_reference0, load_with_tokenizer


def loss(model, tokenizer, text, length):
    """Nats per character over 32 random windows of the characters that the tokenizer knows."""
    ids = np.array(tokenizer.encode("".join(c for c in text if c in tokenizer.characters)), np.int64)
    starts = np.random.default_rng(0).integers(0, len(ids) - length - 1, 32)
    windows = np.stack([ids[start:start + length + 1] for start in starts])
    with tg.no_grad():
        return model(tg.tensor(windows[:, :-1]), tg.tensor(windows[:, 1:]))[1].item()


def text_of(name):
    return data_file(f"reference0/{name}").read_text(encoding="utf-8")[:400_000]


def test_base_model():
    model, tokenizer = load_reference0(data_file("reference0/my_model.npz"))
    assert tokenizer.vocab_size == 131 and tokenizer.encode("\n a") == [0, 1, 66]
    text = text_of("requests.txt")
    for length, expected in ((34, 0.96), (64, 0.76), (128, 0.73)):
        assert abs(loss(model, tokenizer, text, length) - expected) < 0.03
    assert load(data_file("reference0/my_model.npz"))[1] is None


def test_both_lora_matrices_are_used():
    base, tokenizer = load_reference0(data_file("reference0/my_model.npz"))
    tuned, _ = load_reference0(data_file("reference0/my_model.npz"), data_file("reference0/lora_weights.npz"))
    text = text_of("python_fundamentals.txt")
    assert loss(base, tokenizer, text, 64) > 2.9
    assert loss(tuned, tokenizer, text, 64) < 2.3
    # a factor of one head, by hand
    arrays, lora = (np.load(data_file(f"reference0/{name}.npz"), allow_pickle=False)
                    for name in ("my_model", "lora_weights"))
    name = "transform.2.head.3.value.lora_"
    value = (arrays["transform.2.multi_head_attention_block.heads.3.value"]
             + lora[name + "A"] @ lora[name + "B"] / 8)                        # (64, 8)
    rows = tuned.transformer.h[2].attn.c_attn.weight.detach().numpy()[2 * 64 + 3 * 8:2 * 64 + 4 * 8]
    np.testing.assert_allclose(rows, value.T, rtol=1e-6)


def test_conversion_to_a_run(tmp_path, capsys):
    source, lora = str(data_file("reference0/my_model.npz")), str(data_file("reference0/lora_weights.npz"))
    assert convert_model([source, str(tmp_path / "run"), "--to", "run", "--lora", lora]) == 0
    model, tokenizer, config = load_with_tokenizer(tmp_path / "run")
    assert config.norm_position == "post" and config.activation == "relu" and config.block_size == 1000
    expected, _ = load_reference0(source, lora)
    ids = [tokenizer.encode("import requests\n")]
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(expected, ids))
    assert "wrote" in capsys.readouterr().out
    assert convert_model([source, str(tmp_path / "hf")]) == 2
    assert "norm_position post" in capsys.readouterr().err


def test_damaged_archives(tmp_path):
    def write(name="position_matrix.npy", content=b"", **arrays):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        if arrays:
            np.savez(path, **arrays)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(name, content)
        return path

    (tmp_path / "vocab.json").write_text('{"chars": ["a", "b"]}')
    claims = b"\x93NUMPY\x01\x00" + (76).to_bytes(2, "little")
    claims += b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(75) + b"\n" + bytes(64)
    for path, message in (
            (write(content=claims), r"position_matrix.npy claims float64 \(1000000000000,\)"),
            (write(content=b"nothing"), "not an .npz of arrays"),
            (write(position_matrix=np.array([{"a": 1}], dtype=object)), "not an .npz of arrays"),
            (write(a=np.zeros(3)), "no arrays of a transformer"),
            (write(position_matrix=np.zeros((4, 2)), **{"transform.0.W1": np.zeros((2, 8)),
             "transform.0.multi_head_attention_block.heads.0.key": np.zeros((2, 2))}), "query must be an array of")):
        with pytest.raises(UserError, match=message):
            load_reference0(path)
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="not an .npz"):
        load_reference0(tmp_path / "x.npz")
