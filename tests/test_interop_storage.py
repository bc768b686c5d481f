"""Models opened with their weights in 16 or 8 bits, and how much memory that takes."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interop_tools import MODERN, logits_of, make_model
from tiny_run import tiny_config, tiny_trainer

import tensorgrad as tg
from gpt import cli
from gpt.errors import UserError
from gpt.interop import export_hf, load_with_tokenizer
from gpt.interop.load import load
from gpt.interop.safetensors import WEIGHTS, read_safetensors
from gpt.training.checkpoints import load_run, save_best, start_run
from tensorgrad import nn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
IDS = np.random.default_rng(0).integers(0, 97, (2, 20))


def rewrite(path, kind):
    """Turn a safetensors file into one of the type BF16 or F16, as published models are."""
    header, parts, at = {}, [], 0
    for name, stored in read_safetensors(path).items():
        wide = np.ascontiguousarray(stored.read())
        part = (wide.view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else wide.astype(np.float16)
        header[name] = {"dtype": kind, "shape": stored.shape, "data_offsets": [at, at + part.nbytes]}
        parts.append(part.tobytes())
        at += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def mapped(array):
    """Does the array lie in a mapped file of weights?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if line.endswith(WEIGHTS) and start <= array.ctypes.data < end:
            return True
    return False


@pytest.mark.parametrize("kind, dtype", [("BF16", "bfloat16"), ("F16", "float16")])
@pytest.mark.parametrize("changes", [MODERN, {"bias": True}], ids=["llama", "gpt2"])
def test_sixteen_bits_stay_as_they_are(tmp_path, kind, dtype, changes):
    export_hf(make_model(**changes), tmp_path / "model")
    rewrite(tmp_path / "model" / WEIGHTS, kind)
    narrow, wide = load(tmp_path / "model", dtype=dtype)[0], load(tmp_path / "model")[0]
    np.testing.assert_allclose(logits_of(narrow, IDS), logits_of(wide, IDS), rtol=0, atol=1e-5)
    for name, p in narrow.named_parameters():
        if p.ndim == 2:
            assert isinstance(p, nn.PackedWeight) and p.kind == dtype
            np.testing.assert_array_equal(p.widened().numpy(), wide.get_parameter(name).detach().numpy())
        else:
            assert p.dtype == tg.float32
    assert mapped(narrow.transformer.wte.weight.array) and narrow.lm_head.weight is narrow.transformer.wte.weight
    if changes is MODERN:  # gate and up lie one below the other in the file, as transformers writes them
        block = narrow.transformer.h[1]
        assert mapped(block.attn.c_proj.weight.array) and mapped(block.mlp.c_fc.weight.array)
        assert mapped(wide.transformer.h[1].ln_1.weight.array) is False  # 16 bits in the file: widened


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_other_types_are_converted(tmp_path, dtype):
    model = make_model(**MODERN)
    export_hf(model, tmp_path / "model")
    got = load(tmp_path / "model", dtype=dtype)[0]
    assert all(p.kind == dtype for p in got.parameters() if p.ndim == 2)
    np.testing.assert_array_equal(logits_of(got, IDS), logits_of(nn.quantize(model, dtype), IDS))
    export_hf(got, tmp_path / "again")                                         # the rounded values, in float32
    np.testing.assert_allclose(logits_of(load(tmp_path / "again")[0], IDS), logits_of(got, IDS), rtol=0, atol=1e-5)


def test_float32_is_mapped(tmp_path):
    export_hf(make_model(**MODERN), tmp_path / "model")
    model = load(tmp_path / "model")[0]
    block = model.transformer.h[0]
    for layer in (model.transformer.wte, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, block.ln_1):
        assert mapped(layer.weight.array)
    before = (tmp_path / "model" / WEIGHTS).read_bytes()
    block.mlp.c_proj.weight.data.zero_()                                       # the file stays as it is
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == before


def test_runs_and_wrong_types(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path, max_iters=1, block_size=64)
    trainer = tiny_trainer(config)
    start_run(config.out_dir, config, trainer.dataset.tokenizer)
    save_best(config.out_dir, trainer.model)
    for opened in (load_run(config.out_dir, dtype="int8"), load_with_tokenizer(config.out_dir, dtype="int8")):
        assert isinstance(opened[0].lm_head.weight, nn.PackedWeight)
    flags = ["--init_from", config.out_dir, "--prompt=1", "--max_new_tokens=3"]
    assert cli.sample([*flags, "--dtype=bfloat16"]) == 0
    assert cli.sample([*flags, "--dtype=bf16"]) == 2
    assert "dtype must be one of float32, bfloat16, float16, int8, not 'bf16'" in capsys.readouterr().err
    with pytest.raises(UserError, match="on a CPU alone; leave out --dtype with --device cuda"):
        load(config.out_dir, "cuda", "int8")


MEASURE = """
import sys
from gpt.interop.load import load
from gpt.model.cache import KVCache, next_logits
from gpt.model.lora import LoRAConfig, inject
import tensorgrad as tg

def own():  # memory that is this process's alone: mapped files do not count
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = own()
model = load(sys.argv[1], dtype=sys.argv[2])[0]
loaded = own() - before
next_logits(model, [[1, 2, 3]], KVCache(model, 1, 8))
if sys.argv[2] == "bfloat16":  # adapted: no gradient and no optimizer state but the adapter's
    inject(model, LoRAConfig(r=2))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99))
    model(tg.tensor([[1, 2, 3, 4]]), tg.tensor([[2, 3, 4, 5]]))[1].backward()
    optimizer.step()
print(loaded, own() - before)
"""


def test_memory(tmp_path):
    """A bfloat16 file of 50M numbers. Stored as it is, only queries, keys and values, which are three tensors there and
    one here, become the process's own."""
    config = {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_kv_head": 2, "ffn_dim": 1536, "vocab_size": 72000}
    model = make_model(**MODERN | config)
    count = sum(p.numel() for p in model.parameters())
    export_hf(model, tmp_path / "model")
    rewrite(tmp_path / "model" / WEIGHTS, "BF16")
    del model
    found = {}
    for dtype in ("bfloat16", "float32"):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "model"), dtype], capture_output=True,
                              text=True, check=True)
        found[dtype] = [int(number) / count for number in done.stdout.split()]
    loaded, used = found["bfloat16"]       # bytes per weight
    assert loaded < 0.6 and used < 2.0
    loaded, used = found["float32"]
    assert 3.9 < loaded < 4.6 and used < 6.0
