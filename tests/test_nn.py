"""tensorgrad.nn against torch.nn: names, values, gradients, errors."""
import copy

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def seeded_torch():
    torch.manual_seed(0)


def load_from_torch(ours, theirs):
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})


LAYERS = {
    "linear": (lambda n: n.Linear(5, 3), (4, 2, 5)),
    "linear_no_bias": (lambda n: n.Linear(5, 3, bias=False), (5,)),
    "layer_norm": (lambda n: n.LayerNorm(6), (2, 3, 6)),
    "layer_norm_2d": (lambda n: n.LayerNorm((3, 6), eps=1e-3), (2, 3, 6)),
    "layer_norm_no_bias": (lambda n: n.LayerNorm(6, bias=False), (2, 6)),
    "layer_norm_plain": (lambda n: n.LayerNorm(6, elementwise_affine=False), (2, 6)),
    "rms_norm": (lambda n: n.RMSNorm(6), (2, 3, 6)),
    "rms_norm_eps": (lambda n: n.RMSNorm((3, 6), eps=1e-2), (2, 3, 6)),
    "rms_norm_plain": (lambda n: n.RMSNorm(6, elementwise_affine=False), (2, 6)),
    "gelu": (lambda n: n.GELU(), (7,)),
    "gelu_tanh": (lambda n: n.GELU("tanh"), (7,)),
    "relu": (lambda n: n.ReLU(), (7,)),
    "silu": (lambda n: n.SiLU(), (7,)),
    "relu_inplace": (lambda n: n.Sequential(n.Linear(7, 7), n.ReLU(True), n.Dropout(0.0, True)), (7,)),
    "silu_inplace": (lambda n: n.Sequential(n.Linear(7, 7), n.SiLU(inplace=True)), (7,)),
    "tanh": (lambda n: n.Tanh(), (7,)),
    "sigmoid": (lambda n: n.Sigmoid(), (7,)),
    "softmax": (lambda n: n.Softmax(dim=1), (2, 5, 3)),
    "identity": (lambda n: n.Identity(54, unused=1), (7,)),
    "flatten": (lambda n: n.Flatten(), (2, 3, 4)),
    "flatten_dims": (lambda n: n.Flatten(0, 1), (2, 3, 4)),
    "sequential": (lambda n: n.Sequential(n.Linear(5, 8), n.GELU(), n.LayerNorm(8), n.Linear(8, 2)), (3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_torch(name):
    build, shape = LAYERS[name]
    theirs, ours = build(torch.nn).double(), build(nn).double()
    assert repr(ours) == repr(theirs)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == \
           {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.rand_like(p))  # norms start at 1 and 0, which would hide errors
    load_from_torch(ours, theirs)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = tg.tensor(x.detach().numpy(), requires_grad=True)
    y, y2 = theirs(x), ours(x2)
    cotangent = torch.randn(y.shape, dtype=torch.float64)
    np.testing.assert_allclose(y2.detach().numpy(), y.detach().numpy(), rtol=1e-10, atol=1e-12)
    (y * cotangent).sum().backward()
    (y2 * tg.tensor(cotangent.numpy())).sum().backward()
    np.testing.assert_allclose(x2.grad.numpy(), x.grad.numpy(), rtol=1e-10, atol=1e-12)
    for (_, p), (k, p2) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        np.testing.assert_allclose(p2.grad.numpy(), p.grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=k)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_equals_torch(padding_idx):
    theirs, ours = torch.nn.Embedding(7, 3, padding_idx), nn.Embedding(7, 3, padding_idx)
    assert repr(ours) == repr(theirs)
    if padding_idx is not None:
        assert not ours.weight[padding_idx].detach().numpy().any()
    load_from_torch(ours, theirs)
    ids = np.array([[2, 2, 6], [0, 2, 5]])
    cotangent = np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32")
    y, y2 = theirs(torch.from_numpy(ids)), ours(tg.tensor(ids))
    assert np.array_equal(y2.detach().numpy(), y.detach().numpy())
    y.backward(torch.from_numpy(cotangent))
    y2.backward(tg.tensor(cotangent))
    np.testing.assert_allclose(ours.weight.grad.numpy(), theirs.weight.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 1},
                                     {"label_smoothing": 0.1}, {"weight": [0.5, 1.0, 2.0, 0.1]}])
def test_cross_entropy_loss_equals_torch(options):
    logits = np.random.default_rng(0).normal(size=(6, 4))
    targets = np.array([0, 1, 2, 3, 1, 0])
    weight = options.get("weight")
    given = options | ({"weight": np.array(weight)} if weight else {})
    theirs = torch.nn.CrossEntropyLoss(**given | ({"weight": torch.tensor(given["weight"])} if weight else {}))
    ours = nn.CrossEntropyLoss(**given | ({"weight": tg.tensor(given["weight"])} if weight else {}))
    expected = theirs(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(ours(tg.tensor(logits), tg.tensor(targets)).numpy(), expected.numpy(), rtol=1e-12)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss_equals_torch(reduction):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    expected = torch.nn.MSELoss(reduction=reduction)(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(nn.MSELoss(reduction=reduction)(tg.tensor(a), tg.tensor(b)).numpy(), expected.numpy())


def test_dropout_only_in_training():
    layer, x = nn.Dropout(0.25), tg.ones(1000)
    y = layer(x).numpy()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)} and 180 < (y == 0).sum() < 320
    assert np.array_equal(layer.eval()(x).numpy(), x.numpy())
    with pytest.raises(ValueError, match="p is a probability"):
        nn.Dropout(1.5)


# ---- the tree ----

def tree(n, tensor):
    """A model with nesting, buffers, a tied weight, a shared module and an empty place, of either library."""

    class Inner(n.Module):
        def __init__(self):
            super().__init__()
            self.lin = n.Linear(3, 3)
            self.register_buffer("table", tensor([1.0, 2.0]))
            self.scale = n.Parameter(tensor([2.0]))
            self.register_buffer("scratch", tensor([0.0]), persistent=False)

        def forward(self, x):
            return self.lin(x) * self.scale

    class Outer(n.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", tensor([3]))
            self.blocks = n.ModuleList([Inner(), Inner()])
            self.named = n.ModuleDict({"a": n.Linear(3, 3, bias=False), "b": n.ReLU()})
            self.head = n.Linear(3, 3, bias=False)
            self.head.weight = self.named["a"].weight
            self.again = self.blocks[0]
            self.register_parameter("nothing", None)
            self.seq = n.Sequential(n.Linear(3, 2), n.ReLU())

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.seq(self.head(self.named["b"](self.named["a"](x))))

    return Outer()


@pytest.fixture
def pair():
    return tree(torch.nn, torch.tensor), tree(nn, tg.tensor)


def names(pairs):
    return [name for name, _ in pairs]


def test_tree_walks_as_torch(pair):
    theirs, ours = pair
    for method in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        assert names(getattr(ours, method)()) == names(getattr(theirs, method)()), method
    for method in ("named_parameters", "named_buffers", "named_modules"):
        assert names(getattr(ours, method)(prefix="m", remove_duplicate=False)) == \
               names(getattr(theirs, method)(prefix="m", remove_duplicate=False)), method
    assert names(ours.named_parameters(recurse=False)) == names(theirs.named_parameters(recurse=False)) == []
    assert names(ours.blocks[0].named_parameters(recurse=False)) == ["scale"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.state_dict(prefix="x.")) == list(theirs.state_dict(prefix="x."))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert len(list(ours.buffers())) == len(list(theirs.buffers()))
    assert len(list(ours.modules())) == len(list(theirs.modules()))
    assert repr(ours) == repr(theirs)
    assert ours.get_submodule("blocks.1.lin") is ours.blocks[1].lin
    assert ours.get_parameter("head.weight") is ours.named["a"].weight
    with pytest.raises(AttributeError, match="no module 'blocks.7'"):
        ours.get_submodule("blocks.7")


def test_apply_visits_children_first(pair):
    theirs, ours = pair
    orders = []
    for model in pair:
        order = []
        model.apply(lambda m, order=order: order.append(type(m).__name__))
        orders.append(order)
    assert orders[0] == orders[1]


def test_module_list_prints_runs_of_equal_modules():
    def build(n):
        return n.ModuleList([n.ReLU(), n.Linear(2, 2), n.Linear(2, 2), n.Linear(2, 3)])
    assert repr(build(nn)) == repr(build(torch.nn))


def test_state_dict_shares_memory_and_is_detached(pair):
    ours = pair[1]
    state = ours.state_dict()
    assert not any(value.requires_grad for value in state.values())
    with tg.no_grad():
        ours.head.weight.fill_(7.0)
    assert (state["named.a.weight"].numpy() == 7).all() and (state["head.weight"].numpy() == 7).all()


def test_load_state_dict_lists_everything_and_writes_nothing(pair):
    ours = pair[1]
    before = {name: value.numpy().copy() for name, value in ours.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["blocks.0.scale"], state["seq.0.bias"]
    state["extra"] = np.zeros(3)
    state["blocks.1.lin.weight"] = np.zeros((3, 4))
    with pytest.raises(RuntimeError) as error:
        ours.load_state_dict(state)
    message = str(error.value)
    for part in ("missing keys: ", "blocks.0.scale", "seq.0.bias", "unexpected keys: extra",
                 "size mismatch for blocks.1.lin.weight: (3, 4) given, (3, 3) in the model", "nothing was loaded"):
        assert part in message
    with pytest.raises(RuntimeError, match="size mismatch"):  # names may be left out, shapes must fit
        ours.load_state_dict(state, strict=False)
    for name, value in ours.state_dict().items():
        assert np.array_equal(value.numpy(), before[name]), name
    del state["blocks.1.lin.weight"]
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) == {"blocks.0.scale", "blocks.1.lin.weight", "seq.0.bias"} and unexpected == ["extra"]
    assert np.array_equal(ours.seq[0].weight.detach().numpy(), before["seq.0.weight"] + 1)


def test_load_state_dict_keeps_memory_and_dtype():
    layer = nn.Linear(2, 2)
    array = layer.weight.array
    layer.load_state_dict({"weight": np.eye(2), "bias": tg.ones(2, dtype=tg.float64)})
    assert layer.weight.array is array and array.dtype == np.float32
    assert np.array_equal(array, np.eye(2)) and layer.weight.requires_grad


def test_assignment_checks():
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="cannot assign a Tensor to 'weight', which is a Parameter"):
        layer.weight = tg.ones(2, 2)
    layer.bias = None
    assert names(layer.named_parameters()) == ["weight"]
    del layer.weight
    layer.weight = tg.ones(2, 2)  # an ordinary attribute now
    assert names(layer.named_parameters()) == []
    layer.register_buffer("mask", tg.ones(2))
    layer.mask = tg.zeros(2)
    assert names(layer.named_buffers()) == ["mask"]
    with pytest.raises(TypeError, match="buffer 'mask'"):
        layer.mask = 3
    with pytest.raises(KeyError, match="already has an attribute 'forward'"):
        layer.register_buffer("forward", tg.ones(1))
    with pytest.raises(KeyError, match="without '.'"):
        layer.add_module("a.b", nn.ReLU())
    with pytest.raises(TypeError, match="not a Parameter"):
        layer.register_parameter("w", tg.ones(2))
    with pytest.raises(TypeError, match="not a Module"):
        nn.ModuleList([3])
    assert names(nn.Linear(2, 2).named_buffers()) == []  # buffers belong to the instance
    with pytest.raises(TypeError, match="defines no forward"):
        nn.Module()(1)


def test_train_eval_freeze_zero_grad(pair):
    ours = pair[1]
    assert all(m.training for m in ours.modules())
    assert not any(m.training for m in ours.eval().modules())
    assert all(m.training for m in ours.train().modules())
    ours.blocks[0].requires_grad_(False)
    ours(tg.ones(2, 3)).sum().backward()
    assert all((p.grad is None) == name.startswith("blocks.0") for name, p in ours.named_parameters())
    ours.zero_grad(set_to_none=False)
    assert ours.head.weight.grad is not None and not ours.head.weight.grad.numpy().any()
    ours.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_to_dtype_keeps_ties_grads_and_integers(pair):
    ours = pair[1]
    ours(tg.ones(2, 3)).sum().backward()
    assert ours.double() is ours
    assert ours.head.weight is ours.named["a"].weight and ours.again is ours.blocks[0]
    assert all(p.dtype == tg.float64 and p.grad.dtype == tg.float64 and p.requires_grad for p in ours.parameters())
    assert ours.count.dtype == tg.int64 and ours.blocks[0].table.dtype == tg.float64
    assert ours(tg.ones(2, 3, dtype=tg.float64)).dtype == tg.float64
    assert ours.to("cpu", tg.float32).head.weight.dtype == tg.float32
    assert ours.to(tg.ones(1, dtype=tg.float64)).head.weight.dtype == tg.float64
    with pytest.raises(TypeError, match="not a floating dtype"):
        ours.to(tg.int64)


def test_hooks():
    layer, x, seen = nn.Linear(2, 2), tg.ones(1, 2), []
    plain = layer(x).detach().numpy()
    pre = layer.register_forward_pre_hook(lambda m, args: seen.append(("pre", m is layer, len(args))))
    post = layer.register_forward_hook(lambda m, args, out: seen.append(("post", args[0] is x, out.shape)))
    layer(x)
    assert seen == [("pre", True, 1), ("post", True, (1, 2))]
    pre.remove()
    post.remove()
    with_doubled_input = layer.register_forward_pre_hook(lambda m, args: args[0] * 0)
    assert np.array_equal(layer(x).detach().numpy()[0], layer.bias.detach().numpy())
    with_doubled_input.remove()
    layer.register_forward_hook(lambda m, args, out: out * 2)
    layer.register_forward_hook(lambda m, args, out: out + 1)
    np.testing.assert_allclose(layer(x).detach().numpy(), plain * 2 + 1, rtol=1e-6)
    assert len(seen) == 2


def test_module_path_while_tracing(pair):
    from tensorgrad.engine import modes
    ours, paths = pair[1], []
    for module in ours.modules():
        module.register_forward_hook(lambda m, args, out: paths.append(".".join(modes.module_path)))
    modes.module_path = []
    try:
        ours(tg.ones(2, 3))
        assert modes.module_path == []
        with pytest.raises(RuntimeError):
            ours(tg.ones(2, 4))
        assert modes.module_path == []  # cleaned up behind the error
    finally:
        modes.module_path = None
    assert paths[:2] == ["Outer.blocks.0.lin", "Outer.blocks.0"]
    assert paths[-3:] == ["Outer.seq.1", "Outer.seq", "Outer"]


def test_deepcopy_is_independent_and_keeps_ties(pair):
    ours = pair[1]
    twin = copy.deepcopy(ours)
    assert twin.head.weight is twin.named["a"].weight and twin.head.weight is not ours.head.weight
    assert type(twin.head.weight) is nn.Parameter and twin.head.weight.requires_grad
    with tg.no_grad():
        twin.head.weight.fill_(5.0)
    assert not (ours.head.weight.detach().numpy() == 5).any()
    assert list(twin.state_dict()) == list(ours.state_dict())


def test_tied_weight_gets_both_gradients():
    def build(n):
        emb, head = n.Embedding(5, 4), n.Linear(4, 5, bias=False)
        head.weight = emb.weight
        return n.Sequential(emb, head)
    theirs, ours = build(torch.nn), build(nn)
    load_from_torch(ours, theirs)
    ids = np.array([1, 1, 4])
    (theirs(torch.from_numpy(ids)) ** 2).sum().backward()
    (ours(tg.tensor(ids)) ** 2).sum().backward()
    np.testing.assert_allclose(ours[0].weight.grad.numpy(), theirs[0].weight.grad.numpy(), rtol=1e-5)


def test_parameter():
    source = tg.ones(3)
    p = nn.Parameter(source)
    assert p.is_leaf and p.requires_grad and isinstance(p, tg.Tensor) and np.shares_memory(p.array, source.array)
    assert not nn.Parameter(source, requires_grad=False).requires_grad
    assert type(p * 2) is tg.Tensor
    made = nn.Parameter(tg.ones(3, requires_grad=True) * 2)
    assert made.is_leaf


# ---- containers ----

def test_sequential():
    a, b, c = nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)
    seq = nn.Sequential(a, b)
    assert seq.append(c) is seq and len(seq) == 3 and list(seq) == [a, b, c]
    assert seq[-1] is c and list(seq[1:]) == [b, c] and isinstance(seq[:1], nn.Sequential)
    del seq[1]
    assert list(seq.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    seq[1] = b
    assert list(seq) == [a, b]
    seq.insert(0, c)
    assert list(seq) == [c, a, b]
    named = nn.Sequential({"first": a, "act": b})
    assert list(named.state_dict()) == ["first.weight", "first.bias"] and named.first is a
    named[0] = c
    assert named.first is c
    twice = nn.Sequential(b, b)
    assert len(twice) == 2
    with pytest.raises(IndexError):
        seq[5] = a


def test_module_list_and_dict():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    assert names(layers.named_children()) == [str(i) for i in range(12)]
    layers[-1] = nn.Identity()
    assert isinstance(layers[11], nn.Identity)
    assert len(layers.extend([nn.ReLU()])) == 13 and isinstance(layers[3:5], nn.ModuleList)
    table = nn.ModuleDict({"x": nn.ReLU()})
    table["y"] = nn.Linear(1, 1)
    assert list(table) == list(table.keys()) == ["x", "y"] and "x" in table and len(table) == 2
    assert isinstance(table.pop("x"), nn.ReLU) and list(table.items()) == [("y", table.y)]
    with pytest.raises(KeyError, match="already has an attribute 'keys'"):
        table["keys"] = nn.ReLU()
    with pytest.raises(KeyError):
        table["absent"]
    table.clear()
    assert len(table) == 0
