"""Every configuration that comes along is read, checked, and builds its model (shrunk in depth)."""
import dataclasses
import math
from pathlib import Path

import pytest

import tensorgrad as tg
from gpt import GPT
from gpt.training import TrainConfig
from gpt.training.settings import read_toml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_config_is_valid_and_builds(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and any(line.startswith(("# Cost", "# Size")) for line in lines)
    fields = read_toml(path, TrainConfig)
    fields = {"init_from": "what --init_from names"} | fields
    config = dataclasses.replace(TrainConfig(**fields).model_config(97), n_layer=1, block_size=16)
    logits, loss = GPT(config)(tg.zeros(1, 8, dtype=tg.int64), tg.ones(1, 8, dtype=tg.int64))
    assert logits.shape == (1, 8, config.vocab_size)
    assert abs(loss.item() - math.log(config.vocab_size)) < 2  # nothing is known at the start
