"""The operations, by family: in each file first the Op classes (forward on arrays, backward on Tensors), then a mixin
with the Tensor methods of the family, PyTorch's names and semantics. Nothing here imports tensor.py."""
