"""Rows of the operation table: nn.functional. In a call `f` is that namespace."""

from __future__ import annotations

from op_samples import NN, case, constant, ints, positive, real, unary, values, weights

INF = float("inf")
ACTIVATION_EDGES = [0.0, 1.0, -1.0, 3.0, 6.0, 30.0, -30.0, INF, -INF]


def nn(name, *samples, **flags):
    return case(NN + name, *samples, **flags)


def act(name, *samples, edges=ACTIVATION_EDGES):
    """An activation: every shape, values at its edges, then its options."""
    row = unary(NN + name, special=edges, others="")
    more = case(NN + name, *samples).samples
    return type(row)(row.name, row.samples + more)


def beyond(name, formula):
    """A function that PyTorch does not have; there `formula(f, *inputs)` stands for it."""
    def call(f, *inputs):
        return getattr(f, name)(*inputs) if hasattr(f, name) else formula(f, *inputs)

    call.names = (name,)
    return call


EDGES_FINITE = ACTIVATION_EDGES[:-2]

ACTIVATIONS = [
    act("relu"), act("relu6"),
    act("silu", edges=EDGES_FINITE), act("logsigmoid", edges=EDGES_FINITE),
    act("tanhshrink", edges=EDGES_FINITE),
    act("sigmoid"), act("tanh"),
    act("leaky_relu", (lambda f, x: f.leaky_relu(x, 0.2), real(2, 3)), edges=EDGES_FINITE),
    act("elu", (lambda f, x: f.elu(x, alpha=0.5), real(2, 3))),
    act("gelu", (lambda f, x: f.gelu(x, approximate="tanh"), real(2, 3)),
        (lambda f, x: f.gelu(x, approximate="tanh"), values(EDGES_FINITE)),
        (lambda f, x: f.gelu(x, approximate="tanh"), real(0)), edges=EDGES_FINITE),
    act("softplus", (lambda f, x: f.softplus(x, beta=2.0), real(2, 3)),
        (lambda f, x: f.softplus(x, 2, 1), values([0.25, 0.75, 3.0]))),
    act("hardtanh", (lambda f, x: f.hardtanh(x, -0.5, 0.75), real(2, 3))),
    nn("glu", (lambda f, x: f.glu(x), real(2, 4)), (lambda f, x: f.glu(x, dim=0), real(4, 3)),
       (lambda f, x: f.glu(x, 1), real(0, 2))),
    nn("softmax", (lambda f, x: f.softmax(x, dim=-1), real(2, 3)),
       (lambda f, x: f.softmax(x, 1, dtype=x.dtype), real(2, 3)), (lambda f, x: f.softmax(x, dim=0), real(3, 2)),
       (lambda f, x: f.softmax(x, 0), real()), (lambda f, x: f.softmax(x, 1), real(0, 3))),
    nn("log_softmax", (lambda f, x: f.log_softmax(x, dim=-1), real(2, 3)),
       (lambda f, x: f.log_softmax(x, dim=0), real(3, 2)), (lambda f, x: f.log_softmax(x, 1), real(0, 3))),
]

INPLACE = [
    nn(f"{name}:inplace", (lambda f, x, n=name: getattr(f, n)(x * 1, inplace=True), real(2, 3)),
       (lambda f, x, n=name: getattr(f, n)((x * 1)[0], inplace=True), real(2, 3)),
       (lambda f, x, n=name: getattr(f, n)(x * 1, inplace=True), real(0)))
    for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "hardtanh")
]

def halves(x):
    return x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]


def turned(x, cos, sin):
    """A complex product, pair by pair, for tables whose halves are equal."""
    (low, high), (c, _), (s, _) = halves(x), halves(cos), halves(sin)
    return low * c - high * s, low * s + high * c


ANGLES = [[0.1, 2.0, 0.1, 2.0], [0.7, -1.0, 0.7, -1.0], [5.0, 0.0, 5.0, 0.0]]
swiglu = beyond("swiglu", lambda f, a, b=None: f.silu(halves(a)[0]) * halves(a)[1] if b is None else f.silu(a) * b)
relu2 = beyond("relu2", lambda f, x: f.relu(x) ** 2)
rotary = beyond("rotary", lambda f, q, k, cos, sin: tuple(
    (low, high) for low, high in (turned(x, cos, sin) for x in (q, k))))


def turn(f, q, k, angles):
    """The halves of both, as `turned` gives them."""
    found = rotary(f, q, k, angles.cos(), angles.sin())
    return found if isinstance(found[0], tuple) else tuple(halves(x) for x in found)


turn.names = ("rotary",)


def sum_and(norm):
    """Its name with add_, for a sum; the shape to normalize over comes as a tensor."""
    name = f"add_{norm}"

    def call(f, x, r, shape, *affine):
        shape = tuple(shape.tolist())
        if hasattr(f, name):
            return getattr(f, name)(x, r, shape, *affine)
        return getattr(f, norm)(x + r, shape, *affine), x + r

    call.names = (name,)
    return call


add_layer_norm, add_rms_norm = sum_and("layer_norm"), sum_and("rms_norm")
BLOCK = [
    nn("swiglu", (swiglu, real(2, 6)), (swiglu, real(3, 2, 4)), (swiglu, real(2)), (swiglu, real(0, 4)),
       (swiglu, real(2, 3), real(2, 3)), (swiglu, real(2, 3), real(3)), (swiglu, real(), real()),
       (swiglu, values([30.0, -30.0, 0.0, 0.0]))),
    nn("relu2", (relu2, real(2, 3)), (relu2, real()), (relu2, real(0)), (relu2, values([0.0, -0.0, INF, -INF, 1.0]))),
    nn("add_layer_norm", (add_layer_norm, real(2, 4), real(2, 4), values((4,)), real(4), real(4)),
       (add_layer_norm, real(2, 1, 4), real(2, 1, 4), values((4,)), real(4)),
       (add_layer_norm, real(2, 4), real(2, 4), values((4,))), (add_layer_norm, real(2, 4), real(4), values((4,))),
       (lambda *xs: add_layer_norm(*xs)[0], real(3, 4), real(3, 4), values((4,)), real(4), real(4)),
       (lambda *xs: add_layer_norm(*xs)[1], real(3, 4), real(3, 4), values((4,)), real(4), real(4)),
       (lambda f, x, s: add_layer_norm(f, x, x, s), real(3, 4), values((4,))),
       (add_layer_norm, real(2, 2, 3), real(2, 2, 3), values((2, 3)), real(2, 3), real(2, 3)),
       (add_layer_norm, real(0, 4), real(0, 4), values((4,)), real(4), real(4))),
    nn("add_rms_norm", (add_rms_norm, real(2, 4), real(2, 4), values((4,)), real(4)),
       (add_rms_norm, real(2, 1, 4), real(2, 1, 4), values((4,))), (add_rms_norm, real(2, 4), real(1), values((4,))),
       (lambda *xs: add_rms_norm(*xs)[0], real(3, 4), real(3, 4), values((4,)), real(4)),
       (lambda *xs: add_rms_norm(*xs)[1], real(3, 4), real(3, 4), values((4,)), real(4)),
       (add_rms_norm, real(2, 2, 3), real(2, 2, 3), values((2, 3)), real(2, 3)),
       (add_rms_norm, real(0, 4), real(0, 4), values((4,)), real(4))),
    nn("rotary", (turn, real(2, 2, 3, 4), real(2, 1, 3, 4), constant(ANGLES)),
       (turn, real(3, 4), real(2, 3, 4), constant(ANGLES)), (turn, real(0, 3, 4), real(1, 3, 4), constant(ANGLES)),
       (lambda f, q, k, angles: turn(f, q, k, angles)[1], real(1, 1, 3, 4), real(1, 1, 3, 4), constant(ANGLES)),
       (turn, real(1, 1, 2, 4), real(1, 2, 2, 4), constant([[ANGLES[:2]]])), view=None),
]

LAYERS = [
    nn("linear", (lambda f, x, w: f.linear(x, w), real(2, 3), real(4, 3)),
       (lambda f, x, w, b: f.linear(x, w, b), real(2, 2, 3), real(2, 3), real(2)),
       (lambda f, x, w, b: f.linear(x, w, b), real(3), real(2, 3), real(2)),
       (lambda f, x, w, b: f.linear(x, w, bias=b), real(0, 3), real(2, 3), real(2))),
    nn("embedding", (lambda f, i, w: f.embedding(i, w), ints(2, 3), real(3, 2)),
       (lambda f, i, w: f.embedding(i, w), values([1, 1, 1]), real(3, 2)),
       (lambda f, i, w: f.embedding(i, w, padding_idx=1), ints(4), real(3, 2)),
       (lambda f, i, w: f.embedding(i, w), ints(), real(3, 2)),
       (lambda f, i, w: f.embedding(i, w), ints(0), real(3, 2))),
    nn("layer_norm", (lambda f, x: f.layer_norm(x, (4,)), real(2, 4)),
       (lambda f, x, w, b: f.layer_norm(x, (4,), w, b), real(2, 4), real(4), real(4)),
       (lambda f, x, w: f.layer_norm(x, (4,), weight=w, eps=0.1), real(2, 4), real(4)),
       (lambda f, x, w, b: f.layer_norm(x, (2, 3), w, b), real(2, 2, 3), real(2, 3), real(2, 3)),
       (lambda f, x, w, b: f.layer_norm(x, (4,), w, b), real(0, 4), real(4), real(4))),
    nn("rms_norm", (lambda f, x: f.rms_norm(x, (4,)), real(2, 4)),
       (lambda f, x, w: f.rms_norm(x, (4,), w), real(2, 4), real(4)),
       (lambda f, x, w: f.rms_norm(x, (4,), weight=w, eps=0.1), real(2, 4), real(4)),
       (lambda f, x, w: f.rms_norm(x, (2, 3), w, 1e-6), real(2, 2, 3), real(2, 3)),
       (lambda f, x, w: f.rms_norm(x, (4,), w), real(0, 4), real(4))),
    nn("dropout", (lambda f, x: f.dropout(x, 0.4), real(4, 4)), (lambda f, x: f.dropout(x), real(0, 3)),
       (lambda f, x: f.dropout(x, 0.5, training=True), real(3, 1)), (lambda f, x: f.dropout(x, 1.0), real(2)),
       random=True, view=None),
    nn("one_hot", (lambda f, x: f.one_hot(x, 4), ints(2, 3)), (lambda f, x: f.one_hot(x), values([2, 0])),
       (lambda f, x: f.one_hot(x, num_classes=3), ints(0)), (lambda f, x: f.one_hot(x, 3), ints()), grad=False),
    nn("pad", (lambda f, x: f.pad(x, (1, 2)), real(2, 3)), (lambda f, x: f.pad(x, (0, 1, 2, 0), value=1.5), real(2, 3)),
       (lambda f, x: f.pad(x, (-1, 1)), real(2, 3)), (lambda f, x: f.pad(x, (1, 0)), ints(2)),
       (lambda f, x: f.pad(x, (1, 1)), real(2, 0))),
    nn("pad:modes", (lambda f, x: f.pad(x, (2, 1), mode="reflect"), real(1, 2, 3)),
       (lambda f, x: f.pad(x, (1, 2, 2, 1), mode="replicate"), real(1, 1, 2, 2)),
       (lambda f, x: f.pad(x, (1, 2), mode="circular"), real(1, 2, 3)),
       (lambda f, x: f.pad(x, (1, 1), mode="reflect"), real(0, 1, 3))),
    nn("normalize", (lambda f, x: f.normalize(x), real(2, 3)), (lambda f, x: f.normalize(x, p=1, dim=0), real(2, 3)),
       (lambda f, x: f.normalize(x, dim=-1), values([[0.0, 0.0], [3.0, 4.0]])),
       (lambda f, x: f.normalize(x), real(0, 3))),
    nn("cosine_similarity", (lambda f, x, y: f.cosine_similarity(x, y), real(2, 3), real(2, 3)),
       (lambda f, x, y: f.cosine_similarity(x, y, dim=0), real(3), real(3)),
       (lambda f, x, y: f.cosine_similarity(x, y, dim=-1), real(2, 1, 3), real(2, 3)),
       (lambda f, x, y: f.cosine_similarity(x, y), real(0, 3), real(0, 3))),
    nn("scaled_dot_product_attention",
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v), real(2, 2, 3), real(2, 4, 3), real(2, 4, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True), real(1, 2, 3, 2), real(1, 2, 3, 2),
        real(1, 2, 3, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True), real(1, 1, 2, 2), real(1, 1, 4, 2),
        real(1, 1, 4, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), real(1, 1, 4, 2),
        real(1, 1, 2, 2), real(1, 1, 2, 2)),
       (lambda f, q, k, v, m: f.scaled_dot_product_attention(q, k, v, attn_mask=m), real(1, 2, 2, 2), real(1, 2, 3, 2),
        real(1, 2, 3, 2), real(2, 3)),
       (lambda f, q, k, v, m: f.scaled_dot_product_attention(q, k, v, attn_mask=m), real(1, 1, 2, 2), real(1, 1, 3, 2),
        real(1, 1, 3, 2), values([[True, False, True], [True, True, False]])),
       (lambda f, q, k, v, m: f.scaled_dot_product_attention(q, k, v, attn_mask=m), real(1, 1, 2, 2), real(1, 1, 2, 2),
        real(1, 1, 2, 2), values([[True, False], [False, False]])),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, enable_gqa=True), real(1, 4, 2, 2), real(1, 2, 2, 2),
        real(1, 2, 2, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v), real(0, 1, 2, 2), real(0, 1, 2, 2),
        real(0, 1, 2, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, dropout_p=0.0), real(2, 2), real(3, 2), real(3, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v), real(1, 2, 2, 2), real(1, 1, 3, 2),
        real(1, 1, 3, 2))),
    nn("scaled_dot_product_attention:dropout",
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, dropout_p=0.3), real(1, 2, 3, 2), real(1, 2, 3, 2),
        real(1, 2, 3, 2)),
       (lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, None, 0.3, True), real(0, 3, 2), real(0, 3, 2),
        real(0, 3, 2)), random=True),
]


def loss(name, *samples, target=real, mean="mean"):
    """A loss of (input, target): the three reductions, 0-d and zero-size; then its own options."""
    return nn(name,
              *((lambda f, x, y, r=r: getattr(f, name)(x, y, reduction=r), real(2, 3), target(2, 3))
                for r in (mean, "sum", "none")),
              (lambda f, x, y: getattr(f, name)(x, y, reduction=mean), real(), target()),
              (lambda f, x, y: getattr(f, name)(x, y, reduction="sum"), real(0, 3), target(0, 3)), *samples)


def prob(*shape):
    return real(*shape, low=0.05, high=0.95)


REDUCTIONS = ("mean", "sum", "none")
CLASSES = values([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])
LOSSES = [
    loss("mse_loss", (lambda f, x, y, w: f.mse_loss(x, y, weight=w), real(3), real(3), weights(3))),
    loss("l1_loss", (lambda f, x, y: f.l1_loss(x, y), values([1.0, 2.0]), values([1.0, 0.0]))),
    loss("smooth_l1_loss", (lambda f, x, y: f.smooth_l1_loss(x, y, beta=0.3), real(3), real(3)),
         (lambda f, x, y: f.smooth_l1_loss(x, y), values([1.0, 2.0, 3.0]), values([1.0, 1.0, 1.0])),
         (lambda f, x, y: f.smooth_l1_loss(x, y, beta=0.0), real(3), real(3))),
    loss("binary_cross_entropy_with_logits",
         (lambda f, x, y, w: f.binary_cross_entropy_with_logits(x, y, weight=w), real(2, 3), prob(2, 3), weights(3)),
         (lambda f, x, y, w: f.binary_cross_entropy_with_logits(x, y, pos_weight=w, reduction="sum"), real(2, 3),
          prob(2, 3), weights(3)),
         (lambda f, x, y: f.binary_cross_entropy_with_logits(x, y), values([100.0, -100.0, 0.0]),
          values([1.0, 1.0, 0.0])), target=prob),
    loss("kl_div", (lambda f, x, y: f.kl_div(x, y, reduction="batchmean"), real(2, 3), positive(2, 3)),
         (lambda f, x, y: f.kl_div(x, y, reduction="sum", log_target=True), real(2, 3), real(2, 3)),
         (lambda f, x, y: f.kl_div(x, y, reduction="none"), real(2), constant([0.0, 1.0])), target=positive,
         mean="batchmean"),
    nn("nll_loss",
       *((lambda f, x, y, r=r: f.nll_loss(x, y, reduction=r), real(4, 3), ints(4)) for r in REDUCTIONS),
       (lambda f, x, y, w: f.nll_loss(x, y, w), real(4, 3), ints(4), weights(3)),
       (lambda f, x, y: f.nll_loss(x, y, ignore_index=1), real(4, 3), values([0, 1, 2, 1])),
       (lambda f, x, y: f.nll_loss(x, y), real(3), ints()),
       (lambda f, x, y: f.nll_loss(x, y), real(2, 3, 2), ints(2, 2)),
       (lambda f, x, y: f.nll_loss(x, y, reduction="sum"), real(0, 3), ints(0))),
    nn("cross_entropy",
       *((lambda f, x, y, r=r: f.cross_entropy(x, y, reduction=r), real(4, 3), ints(4)) for r in REDUCTIONS),
       (lambda f, x, y: f.cross_entropy(x, y, ignore_index=1), real(4, 3), values([0, 1, 2, 1])),
       (lambda f, x, y: f.cross_entropy(x, y), real(3, 3), values([0, -100, 2])),
       (lambda f, x, y: f.cross_entropy(x, y, label_smoothing=0.1), real(4, 3), ints(4)),
       (lambda f, x, y: f.cross_entropy(x, y, ignore_index=2, label_smoothing=0.2), real(3, 3), values([0, 2, 1])),
       (lambda f, x, y, w: f.cross_entropy(x, y, weight=w), real(4, 3), ints(4), weights(3)),
       (lambda f, x, y, w: f.cross_entropy(x, y, w, label_smoothing=0.1, reduction="sum"), real(4, 3), ints(4),
        weights(3)),
       (lambda f, x, y, w: f.cross_entropy(x, y, w, label_smoothing=0.1), real(4, 3), ints(4), weights(3)),
       (lambda f, x, y: f.cross_entropy(x, y), real(2, 3), prob(2, 3)),
       (lambda f, x, y, w: f.cross_entropy(x, y, weight=w, label_smoothing=0.1), real(2, 3), prob(2, 3), weights(3)),
       (lambda f, x, y: f.cross_entropy(x, y, reduction="none"), real(2, 3), CLASSES),
       (lambda f, x, y: f.cross_entropy(x, y), real(3), ints()),
       (lambda f, x, y: f.cross_entropy(x, y), real(2, 3, 2), ints(2, 2)),
       (lambda f, x, y: f.cross_entropy(x, y, reduction="none"), real(2, 3, 2), prob(2, 3, 2)),
       (lambda f, x, y: f.cross_entropy(x, y, reduction="sum"), real(0, 3), ints(0)),
       (lambda f, x, y: f.cross_entropy(x, y, ignore_index=0), values([[1.0, 2.0], [3.0, 4.0]]), values([0, 0])),
       (lambda f, x, y: f.cross_entropy(x, y), values([[1000.0, 0.0, -1000.0]]), values([1]))),
]

NN_CASES = ACTIVATIONS + INPLACE + BLOCK + LAYERS + LOSSES
