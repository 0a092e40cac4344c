"""Triton kernels. Plain `@triton.jit`, launched by the functions beside them; imported only when one runs."""
