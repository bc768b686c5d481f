"""Whatever somebody writes into the files of a model or adapter: it is read, or refused in one line that names it."""
import json
import resource
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from interop_tools import MODERN, make_model

import tensorgrad as tg
from gpt.errors import UserError
from gpt.interop import export_hf, load_hf, load_reference0, reference0
from gpt.interop.peft import load_peft, save_peft
from gpt.interop.safetensors import read_folder
from gpt.model.lora import LoRAConfig, inject, merge_and_unload, parts

ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-1, 5) | st.floats() | st.text(max_size=5)
                   | st.sampled_from(["linear", "llama3", "default", "gpt2", "qwen3", ".*", "(", "c_attn", "gelu"]),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                       st.sampled_from(["rope_type", "factor", "rope_theta", "a"]), inner, max_size=3), max_leaves=5)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLACES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a Llama, a GPT-2 for transformers, an adapter of the Llama)."""
    root = tmp_path_factory.mktemp("damage")
    llama = make_model(n_layer=1, **MODERN)
    export_hf(llama, root / "llama")
    export_hf(make_model(n_layer=1, bias=True), root / "gpt2")
    inject(llama, LoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    save_peft(llama, root / "peft", base="x")
    return root


def one_line(path, action):
    """Run `action`; nothing but a UserError in one line that names the path's folder may come of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except UserError as error:
        assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, path  # kilobytes


@FUZZ
@given(kind=st.sampled_from(["llama", "gpt2"]), data=st.data())
def test_any_value_in_a_configuration(folders, kind, data):
    path = folders / kind / "config.json"
    whole = json.loads(path.read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3))
    try:
        path.write_text(json.dumps(whole | {key: data.draw(ANY) for key in keys}))
        one_line(path, lambda: load_hf(path.parent))
    finally:
        path.write_text(json.dumps(whole))


@FUZZ
@given(data=st.data())
def test_any_value_in_an_adapters_configuration(folders, data):
    path = folders / "peft" / "adapter_config.json"
    whole = json.loads(path.read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3))
    try:
        path.write_text(json.dumps(whole | {key: data.draw(ANY) for key in keys}))
        one_line(path, lambda: load_peft(make_model(n_layer=1, **MODERN), path.parent))
    finally:
        path.write_text(json.dumps(whole))


@FUZZ
@given(places=PLACES, end=st.integers(0, 1 << 12))
def test_any_bytes_in_an_adapter(folders, places, end):
    path = folders / "peft" / "adapter_model.safetensors"
    whole = path.read_bytes()
    content = bytearray(whole)
    for place, value in places:
        content[place % 600] = value
    try:
        path.write_bytes(bytes(content[:end] if end % 3 == 0 else content))
        one_line(path, lambda: load_peft(make_model(n_layer=1, **MODERN), path.parent))
    finally:
        path.write_bytes(whole)


@FUZZ
@given(index=st.dictionaries(st.sampled_from(["weight_map", "metadata"]), ANY | st.dictionaries(
    st.text(max_size=5), st.text(max_size=9) | st.sampled_from(["a.safetensors", "../a.safetensors", "/etc/passwd"]),
    max_size=3)))
def test_any_index_of_shards(tmp_path, index):
    tg.save({"a": tg.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line(tmp_path, lambda: [tensor.read() for tensor in read_folder(tmp_path).values()])


@FUZZ
@given(places=PLACES, end=st.integers(0, 1 << 12))
@example(places=[(642, 2)], end=1)
def test_any_bytes_in_an_npz(tmp_path, places, end):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, position_matrix=np.zeros((4, 2)), embedding_matrix=np.ones((2, 2)),
                        **{"transform.0.W1": np.zeros((2, 8))})
    (tmp_path / "vocab.json").write_text('{"chars": ["a", "b"]}')
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[:end] if end % 3 == 0 else content))
    one_line(path, lambda: load_reference0(path))


def test_an_archive_that_unpacks_to_much_more(tmp_path, monkeypatch):
    """Zeros pack a thousand times smaller: what is claimed is looked at first."""
    (tmp_path / "vocab.json").write_text('{"chars": ["a", "b"]}')
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open(
            "position_matrix.npy", "w", force_zip64=True) as file:
        for _ in range(4):
            file.write(bytes(1 << 25))
    assert (tmp_path / "x.npz").stat().st_size < 200_000
    monkeypatch.setattr(reference0, "_LARGEST", 1 << 26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="it unpacks to 134,217,728 bytes, more than"):
        load_reference0(tmp_path / "x.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_adapters_in_16_bits(tmp_path):
    """bfloat16, which NumPy has not: the upper halves of float32."""
    model = make_model(n_layer=1, **MODERN)
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = tg.load(file)
    header, body = {}, b""
    for name, tensor in tensors.items():
        bits = (tensor.numpy().view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(bits)]}
        body += bits
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    merge_and_unload(model)
    load_peft(model, tmp_path, "narrow")
    a = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].numpy()
    np.testing.assert_allclose(parts(model, "narrow")[0].lora_A.detach().numpy(), a, rtol=2**-7)
