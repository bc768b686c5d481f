"""CUDA C++ kernels: `source/` has them, `signatures` describes them, one table for all who launch them."""
