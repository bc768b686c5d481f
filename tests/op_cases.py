"""The table of operations: one row each, by family. `tests/test_ops.py` runs every check from it, and fails for a
public operation without a row. To add an operation: its class and method in tensorgrad, and one row here."""

from op_cases_math import BINARY, UNARY
from op_cases_nn import NN_CASES
from op_cases_reduce import LINALG, REDUCE
from op_cases_shape import CAST, INDEX, MAKE, MOVE

CASES = UNARY + BINARY + REDUCE + LINALG + MOVE + INDEX + MAKE + CAST + NN_CASES

# Public names of `tensorgrad` and methods of Tensor that are not operations on values, by what they are.
NOT_OPERATIONS = {
    "making tensors of data": "tensor as_tensor scalar_tensor from_numpy from_dlpack to_dlpack empty new_tensor "
                               "new_full new_zeros new_ones new_empty fill_ zero_ copy_ normal_ uniform_ bernoulli_",
    "reading": "item tolist numpy dim numel nelement size stride is_contiguous is_floating_point is_tensor "
               "is_grad_enabled is_inference_mode_enabled result_type promote_types get_default_dtype element_size",
    "autograd": "backward grad retain_grad register_hook requires_grad_ detach_ no_grad enable_grad inference_mode "
                "set_grad_enabled version",
    "settings": "manual_seed get_rng_state set_rng_state set_default_dtype get_float32_matmul_precision "
                "set_float32_matmul_precision use_deterministic_algorithms are_deterministic_algorithms_enabled",
    "files": "save load",
    "measuring": "memory_stats",
    "needs a package of its own": "bfloat16",
    "devices": "device cuda",
}

# What must fail, in PyTorch too, with a message that names the operation: (operation, call).
BAD_CALLS = [
    ("add", lambda t: t.ones(2, 3) + t.ones(2, 4)),
    ("mul", lambda t: t.mul(t.ones(3), t.ones(2))),
    ("matmul", lambda t: t.ones(2, 3) @ t.ones(2, 3)),
    ("matmul", lambda t: t.ones(()) @ t.ones(3)),
    ("matmul", lambda t: t.ones(2, 2, 3) @ t.ones(3, 3, 2)),
    ("bmm", lambda t: t.bmm(t.ones(2, 2, 3), t.ones(1, 3, 2))),
    ("mv", lambda t: t.mv(t.ones(2, 3), t.ones(2))),
    ("einsum", lambda t: t.einsum("ij,jk->ik", t.ones(2, 3), t.ones(2, 3))),
    ("einsum", lambda t: t.einsum("ij->ik", t.ones(2, 3))),
    ("reshape", lambda t: t.ones(2, 3).reshape(4, 2)),
    ("reshape", lambda t: t.ones(2, 3).reshape(-1, -1)),
    ("view", lambda t: t.ones(2, 3).t().view(6)),
    ("permute", lambda t: t.ones(2, 3).permute(0, 0)),
    ("transpose", lambda t: t.ones(2, 3).transpose(0, 2)),
    ("squeeze", lambda t: t.ones(2, 1).squeeze(2)),
    ("unsqueeze", lambda t: t.ones(2).unsqueeze(3)),
    ("expand", lambda t: t.ones(2, 3).expand(4, 3)),
    ("cat", lambda t: t.cat([t.ones(2, 3), t.ones(2, 2)])),
    ("cat", lambda t: t.cat([])),
    ("stack", lambda t: t.stack([t.ones(2), t.ones(3)])),
    ("split", lambda t: t.ones(5).split([2, 2])),
    ("sum", lambda t: t.ones(2, 3).sum(2)),
    ("sum", lambda t: t.ones(2, 3).sum((0, 0))),
    ("mean", lambda t: t.ones(3).to(t.int64).mean()),
    ("amax", lambda t: t.zeros(0).amax()),
    ("argmax", lambda t: t.zeros(0).argmax()),
    ("softmax", lambda t: t.softmax(t.ones(2), 1)),
    ("topk", lambda t: t.ones(3).topk(4)),
    ("gather", lambda t: t.ones(2, 3).gather(1, t.tensor([[3]]))),
    ("index_select", lambda t: t.ones(2, 3).index_select(0, t.tensor([2]))),
    ("masked_fill", lambda t: t.ones(2).masked_fill(t.tensor([1, 0]), 0.0)),
    ("one_hot", lambda t: t.nn.functional.one_hot(t.tensor([3]), 3)),
    ("embedding", lambda t: t.nn.functional.embedding(t.tensor([3]), t.ones(3, 2))),
    ("cross_entropy", lambda t: t.nn.functional.cross_entropy(t.ones(2, 3), t.tensor([0, 3]))),
    ("cross_entropy", lambda t: t.nn.functional.cross_entropy(t.ones(2, 3), t.tensor([0, 1, 2]))),
    ("layer_norm", lambda t: t.nn.functional.layer_norm(t.ones(2, 3), (2,))),
    ("linear", lambda t: t.nn.functional.linear(t.ones(2, 3), t.ones(4, 2))),
    ("dropout", lambda t: t.nn.functional.dropout(t.ones(2), 1.5)),
    ("sub", lambda t: t.ones(2) - t.tensor([True, False])),
    ("neg", lambda t: -t.tensor([True])),
    ("pow", lambda t: t.tensor([2]) ** -1),
]
