"""Fused routines on raw arrays of NumPy or CuPy (`xp`), each the readable reference of its operation in `ops/nn.py`."""
