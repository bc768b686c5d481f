"""Checkpoints: complete or not there, whatever happens while they are written; exact; clear when they do not fit."""
import errno
import json
import os
import shutil

import numpy as np
import pytest
from tiny_run import tiny_config, tiny_trainer

import tensorgrad as tg
from gpt.errors import UserError
from gpt.model import GPT
from gpt.training import Checkpoints, files, load_run
from gpt.training.checkpoints import (
    last_folder,
    load_last,
    load_weights,
    pack,
    save_best,
    start_run,
    unpack,
    weights_of,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, max_iters=4, eval_interval=2)


def trained(config, folder, steps=4):
    """A Trainer that has saved into `folder` after `steps` steps."""
    config.max_iters = steps
    trainer = tiny_trainer(config, [Checkpoints(folder)])
    start_run(folder, config, trainer.dataset.tokenizer)
    trainer.fit()
    return trainer


def arrays(named):
    return {name: np.array(tensor.tolist()) for name, tensor in named.items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one, two):
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_a_run_folder_holds_best_and_last(config, tmp_path):
    trainer = trained(config, tmp_path / "run")
    assert names(tmp_path / "run") == ["config.toml", "last", "model.safetensors", "tokenizer.json"]
    assert names(tmp_path / "run" / "last") == [
        "config.toml", "model.safetensors", "tokenizer.json", "train_state.json", "train_state.safetensors"]
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):  # both can be opened; here the last is the best
        model, tokenizer, loaded = load_run(folder)
        assert loaded == config and tokenizer.fingerprint() == trainer.dataset.tokenizer.fingerprint()
        assert not model.training and same(arrays(model.state_dict()), arrays(trainer.model.state_dict()))


def test_the_best_weights_stay_when_later_ones_are_worse(config, tmp_path):
    folder = tmp_path / "run"
    trainer = trained(config, folder)
    best = arrays(load_run(folder)[0].state_dict())
    trainer.best_val_loss, trainer.config.max_iters = -1.0, 8  # nothing beats that
    trainer.fit()
    assert same(arrays(load_run(folder)[0].state_dict()), best)
    assert same(arrays(load_run(folder / "last")[0].state_dict()), arrays(trainer.model.state_dict()))
    assert not same(best, arrays(trainer.model.state_dict()))


def test_save_only_when_better_where_asked(config, tmp_path):
    config.always_save_checkpoint, config.learning_rate, config.min_lr = False, 0.0, 0.0
    saved = []

    class Watch(Checkpoints):
        def save(self, trainer):
            saved.append(trainer.iteration)
            super().save(trainer)

    config.max_iters = 6
    trainer = tiny_trainer(config, [Watch(tmp_path / "run")])
    trainer.fit()
    assert saved == [0, 6]  # the evaluations at 2 and 4 were no better than that at 0; 6 is the end


def test_tied_weights_are_stored_once_and_stay_tied(config, tmp_path):
    folder = tmp_path / "run"
    trained(config, folder)
    assert "lm_head.weight" not in tg.load(folder / "model.safetensors")
    model, _, _ = load_run(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_float64_weights_come_back_exactly(config, tmp_path):
    config.dtype = "float64"
    trainer = trained(config, tmp_path / "run")
    model, _, _ = load_run(tmp_path / "run")
    assert {str(p.dtype) for p in model.parameters()} == {"float64"}
    assert same(arrays(model.state_dict()), arrays(trainer.model.state_dict()))


def test_a_transposed_weight_survives(config, tmp_path):
    trainer = trained(config, tmp_path / "run")
    model = trainer.model
    weight = model.transformer.h[0].mlp.c_fc.weight
    values = np.arange(weight.numel(), dtype=np.float32).reshape(weight.shape[::-1])
    weight.data = tg.tensor(values).t()  # Fortran order
    save_best(tmp_path / "run", model)
    loaded, _, _ = load_run(tmp_path / "run")
    np.testing.assert_array_equal(np.array(loaded.transformer.h[0].mlp.c_fc.weight.tolist()), values.T)


def test_state_is_stored_exactly(config, tmp_path):
    folder = tmp_path / "run"
    trainer = trained(config, folder)
    expected = trainer.state_dict()
    state = load_last(folder, tiny_trainer(config).model)
    one, two = {}, {}
    assert pack(state, one) == json.loads(json.dumps(pack(expected, two)))
    assert same(arrays(one), arrays(two)) and len(one) > 10


def test_pack_and_unpack_are_inverse():
    tensors = {}
    tree = {"a": {0: tg.ones(2), 10: {"b": 1.5, "c": None}}, "list": [True, "x", [tg.zeros(1)]]}
    packed = json.loads(json.dumps(pack(tree, tensors)))
    assert list(tensors) == ["a.0", "list.2.0"]
    back = unpack(packed, tensors)
    assert back["a"][0] is tensors["a.0"] and back["list"][2][0] is tensors["list.2.0"]
    assert back["a"][10] == {"b": 1.5, "c": None} and back["list"][:2] == [True, "x"]


# ---- crashes and full disks ----

class Crash(BaseException):
    """The process dies here."""


STEPS = ["mkdir", "save", "fsync", "rename", "replace", "rmtree"]


@pytest.mark.parametrize("call", STEPS)
@pytest.mark.parametrize("number", range(8))
def test_a_crash_at_any_moment_leaves_one_whole_checkpoint(config, tmp_path, monkeypatch, call, number):
    """Die at the number-th call of each function that touches the disk: last/ is then that of iteration 4 or of 6,
    whole, and the next save succeeds."""
    folder = tmp_path / "run"
    trainer = trained(config, folder)
    before = arrays(trainer.model.state_dict())
    trainer.config.max_iters = 6
    owners = {"save": tg, "mkdir": files.Path, "rmtree": shutil}
    owner, name = owners.get(call, os), call
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:  # nothing runs after the crash, no cleaning up either
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(files, "delete", undead(files.delete, calls, number))
    monkeypatch.setattr(owner, name, dying)
    try:
        trainer.fit()
        crashed = False
    except Crash:
        crashed = True
    monkeypatch.undo()
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))

    fresh = tiny_trainer(config)
    iteration = load_last(folder, fresh.model)["iteration"]
    weights = arrays(fresh.model.state_dict())
    assert iteration in (4, 6) and (iteration == 6 or crashed)
    assert same(weights, before) if iteration == 4 else same(weights, arrays(trainer.model.state_dict()))
    assert json.loads((last_folder(folder) / "train_state.json").read_text())["iteration"] == iteration
    load_run(folder)

    fresh.callbacks.append(Checkpoints(folder))
    fresh.load_state_dict(load_last(folder, fresh.model))
    fresh.config.max_iters = 8
    fresh.fit()
    assert load_last(folder, fresh.model)["iteration"] == 8
    assert names(folder) == ["config.toml", "last", "model.safetensors", "tokenizer.json"]


def undead(delete, calls, number):
    """`delete`, until the crash; then nothing."""
    return lambda path: delete(path) if len(calls) <= number else None


@pytest.mark.parametrize("when", ["best weights", "weights", "state", "json", "fsync"])
def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path, monkeypatch, when):
    folder = tmp_path / "run"
    trainer = trained(config, folder)
    before = contents(folder)
    trainer.config.max_iters = 6
    trainer.best_val_loss = 99.0 if when == "best weights" else -1.0
    real_save, real_write = tg.save, files.Path.write_text
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    part = {"best weights": "model", "weights": "model", "state": "train_state"}.get(when, "none of them")

    def save(tensors, path, *args, **kwargs):
        if path.name.startswith(part):
            path.write_bytes(b"half a file")
            raise full
        return real_save(tensors, path, *args, **kwargs)

    def write_text(path, *args, **kwargs):
        if when == "json":
            raise full
        return real_write(path, *args, **kwargs)

    def fsync(handle):
        raise full

    monkeypatch.setattr(tg, "save", save)
    monkeypatch.setattr(files.Path, "write_text", write_text)
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert os.strerror(errno.ENOSPC) in message and str(folder) in message and "space" in message
    assert "\n" not in message
    assert contents(folder) == before  # and nothing half written


# ---- what does not fit ----

def rewrite(folder, change):
    tensors = dict(tg.load(folder / "model.safetensors"))
    change(tensors)
    tg.save(tensors, folder / "model.safetensors")


def test_a_checkpoint_of_another_shape_names_the_first_tensor_and_both_shapes(config, tmp_path):
    folder = tmp_path / "run"
    trained(config, folder)
    config.n_embd = 24
    model = GPT(config.model_config(trained_vocabulary(folder)))
    with pytest.raises(UserError) as caught:
        load_weights(model, folder)
    size = trained_vocabulary(folder)
    assert f"transformer.wte.weight has shape ({size}, 16), in the model it has ({size}, 24)" in str(caught.value)
    assert "config.toml" in str(caught.value)


def trained_vocabulary(folder):
    return load_run(folder)[1].vocab_size


def test_a_missing_and_an_unknown_tensor_are_named(config, tmp_path):
    folder = tmp_path / "run"
    model = trained(config, folder).model
    rewrite(folder, lambda tensors: tensors.pop("transformer.wpe.weight"))
    with pytest.raises(UserError, match="has no tensor transformer.wpe.weight"):
        load_weights(model, folder)
    rewrite(folder, lambda tensors: tensors.update({"transformer.wpe.weight": tg.ones(16, 16), "extra": tg.ones(1)}))
    with pytest.raises(UserError, match="has a tensor extra, which the model does not"):
        load_weights(model, folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 100], ids=["empty", "text", "bytes"])
def test_a_damaged_file_is_named(config, tmp_path, content):
    folder = tmp_path / "run"
    model = trained(config, folder).model
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors"):
        load_weights(model, folder)


def test_a_truncated_file_is_named(config, tmp_path):
    folder = tmp_path / "run"
    model = trained(config, folder).model
    content = (folder / "last" / "train_state.safetensors").read_bytes()
    (folder / "last" / "train_state.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match="train_state.safetensors"):
        load_last(folder, model)
    (folder / "last" / "train_state.safetensors").write_bytes(content)
    (folder / "last" / "train_state.json").write_text('{"iteration": ')
    with pytest.raises(UserError, match="train_state.json"):
        load_last(folder, model)


def test_nothing_to_resume(config, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        load_last(tmp_path, tiny_trainer(config).model)


def test_weights_are_those_of_the_model(config):
    model = tiny_trainer(config).model
    assert sum(tensor.numel() for tensor in weights_of(model).values()) == model.num_params(non_embedding=False)
