"""Weights of linear layers and embeddings stored in 16 or 8 bits, for models that run on a CPU or are adapted there.

    nn.quantize(model, "int8")      # or "bfloat16", "float16": in place; frozen from now on

Activations, biases, norms and gradients stay float32: only how the matrices lie in memory changes. Decoding, which
reads all of them for each token, gets faster with every bit that is saved; a large product widens them block by block.
"""

import numpy as np

from ..errors import OpError
from ..kernels import packed
from ..tensor import Tensor
from .layers import Embedding, Linear
from .packed import PackedWeight

GROUP = 64  # numbers of a row that share a scale in int8


def pack(weight, dtype):
    """The PackedWeight nearest to `weight`, a Tensor or array (out, in), in "bfloat16", "float16" or "int8".

    int8 rounds each 64 numbers of a row (the whole row where 64 does not divide its length) to 255 steps between minus
    and plus the largest magnitude among them. Raises OpError for another dtype."""
    array = weight.detach().numpy() if isinstance(weight, Tensor) else weight
    if dtype == "bfloat16":
        return PackedWeight(packed.pack_bfloat16(array))
    if dtype == "float16":
        return PackedWeight(array.astype(np.float16))
    if dtype == "int8":
        return PackedWeight(*packed.pack_int8(array, None if array.shape[1] % GROUP else GROUP))
    raise OpError(f"quantize: dtype must be bfloat16, float16 or int8, got {dtype!r}")


def quantize(module, dtype="int8"):
    """Store the weights of all Linear and Embedding layers in `module` as `dtype`, in place; tied ones stay tied.
    Returns the module. The float32 weights are given up one by one, so that memory never holds all of both."""
    users = {}
    for layer in module.modules():
        if isinstance(layer, (Linear, Embedding)) and not isinstance(layer.weight, PackedWeight):
            users.setdefault(id(layer.weight), []).append(layer)
    for layers in users.values():
        weight = pack(layers[0].weight, dtype)
        for layer in layers:
            layer.weight = weight
    return module
