"""The programs with models of others: sample, convert, and training from them."""
import json

import numpy as np
import pytest
from interop_tools import MODERN, logits_of, make_model

from gpt.cli import convert_model, sample, train
from gpt.interop import export_gguf, export_hf, load, load_with_tokenizer
from gpt.text.tokenizers import BPETokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed")

TEXT = "the quick brown fox jumps over the lazy dog\n" * 60
TOKENIZER = BPETokenizer.train(TEXT, 280)


@pytest.fixture
def sources(tmp_path):
    """{format: path} of one model."""
    model = make_model(**MODERN, vocab_size=TOKENIZER.vocab_size)
    export_hf(model, tmp_path / "hf", TOKENIZER)
    export_gguf(model, tmp_path / "x.gguf", TOKENIZER)
    return model, {"hf": tmp_path / "hf", "gguf": tmp_path / "x.gguf"}


def test_sample_reads_all(sources, capsys):
    _, paths = sources
    texts = []
    for path in paths.values():
        assert sample(["--init_from", str(path), "--prompt", "the", "--temperature", "0", "--max_new_tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith("the")


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_training_goes_on_from_it(sources, tmp_path, capsys, source):
    model, paths = sources
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--data", str(tmp_path / "text.txt"), "--init_from", str(paths[source]), "--out_dir",
             str(tmp_path / "run"), "--max_iters", "5", "--eval_interval", "5", "--eval_iters", "2",
             "--batch_size", "2", "--warmup_iters", "0", "--gradient_accumulation_steps", "1",
             "--learning_rate", "1e-2", "--block_size", "32"]
    assert train(flags) == 0, capsys.readouterr().err
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["val_loss"] for line in losses if "val_loss" in line]
    assert values[-1] < values[0] - 0.2
    trained, _, config = load_with_tokenizer(tmp_path / "run")
    assert (config.n_kv_head, config.position, config.block_size) == (2, "rotary", 32)
    ids = [TOKENIZER.encode("the quick")]
    assert np.abs(logits_of(trained, ids) - logits_of(model, ids)).max() > 0.1


def test_convert_between_all_formats(sources, tmp_path, capsys):
    model, paths = sources
    ids = [TOKENIZER.encode("the quick")]
    expected = logits_of(model, ids)
    hf, run, gguf = str(paths["hf"]), str(tmp_path / "run"), str(tmp_path / "y.gguf")
    for source, target, flags in ((hf, run, ["--to", "run"]), (run, gguf, []), (gguf, str(tmp_path / "again"), []),
                                  (run, str(tmp_path / "half.gguf"), ["--dtype", "float16"])):
        assert convert_model([source, target, *flags]) == 0, capsys.readouterr().err
        found, tokenizer, _ = load_with_tokenizer(target)
        assert np.abs(logits_of(found, ids) - expected).max() <= (1e-2 if "float16" in flags else 1e-5)
        assert tokenizer.encode("fox") == TOKENIZER.encode("fox")
        assert "wrote" in capsys.readouterr().out
    assert load(run)[1] == tmp_path / "run" / "tokenizer.json"


def test_convert_says_what_is_wrong(sources, tmp_path, capsys):
    _, paths = sources
    for words, message in (([str(paths["hf"])], "give a source and a target"),
                           ([str(paths["hf"]), str(paths["hf"])], "is not empty"),
                           ([str(paths["hf"]), str(tmp_path / "z"), "--to", "run", "--dtype", "float16"], "as float32"),
                           ([str(paths["hf"]), str(tmp_path / "z"), "--lora", "x.npz"], "--lora goes with an .npz"),
                           ([str(tmp_path / "no"), str(tmp_path / "z")], "no such file or folder")):
        assert convert_model(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "z").exists()
