"""The readable mathematics of the fused operations, in Tensor methods: their definition, the oracle of their tests, and
what runs under create_graph, where gradients of gradients are wanted."""

import math


def linear(x, weight, bias=None):
    """x (..., in) @ weight (out, in)^T + bias (out)."""
    y = x.matmul(weight.transpose(0, 1))
    return y if bias is None else y + bias


def gelu(x, approximate="none"):
    """x Phi(x), Phi the normal distribution; "tanh": x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    if approximate == "tanh":
        return x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())
    return x * 0.5 * (1 + (x * (1 / math.sqrt(2))).erf())


def silu(x):
    """x sigmoid(x)."""
    return x * x.sigmoid()


def swiglu(gate, value):
    """silu(gate) value."""
    return silu(gate) * value


def relu2(x):
    """max(0, x)^2."""
    return x.relu().square()


def rotary(x, cos, sin):
    """x cos + (-high, low) sin, with x = (low, high) split in the middle of the last dimension."""
    low, high = x.chunk(2, -1)
    return (x * cos + (-high)._cat([low], -1) * sin).to(x.dtype)


def softmax(x, dim):
    """exp(x) / sum(exp(x)) along dim."""
    e = (x - x.detach().amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def log_softmax(x, dim):
    """x - log(sum(exp(x))) along dim."""
    top = x.detach().amax(dim, keepdim=True)
    z = x - top.masked_fill(top.isinf(), 0.0)
    return z - z.exp().sum(dim, keepdim=True).log()


def layer_norm(x, weight=None, bias=None, *, eps):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred * ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x, weight=None, *, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    y = x * ((x * x).mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def cross_entropy(logits, target, ignore_index):
    """-log softmax(logits (n, classes))[target (n)] per row, 0 where target == ignore_index."""
    counted = target != ignore_index
    picked = log_softmax(logits, 1).gather(1, target.masked_fill(~counted, 0).unsqueeze(1)).squeeze(1)
    return -picked.masked_fill(~counted, 0.0)


def embedding(weight, ids):
    """Rows of weight (rows, width) with the numbers in ids (any shape): ids.shape + (width,)."""
    return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])


def attention(q, k, v, mask, causal, scale, keep):
    """softmax(scale q k^T + mask) v; a row that is masked altogether gives zeros."""
    scores = (q * scale).matmul(k.transpose(-2, -1))
    if causal:
        hidden = scores.new_ones(*scores.shape[-2:]).bool().triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == bool else scores + mask
    if not scores.shape[-1]:
        return scores.matmul(v)
    top = scores.detach().amax(-1, keepdim=True)
    e = (scores - top.masked_fill(top.isinf(), 0.0)).exp()
    total = e.sum(-1, keepdim=True)
    p = e / total.masked_fill(total == 0, 1.0)
    return (p if keep is None else p * keep).matmul(v)
