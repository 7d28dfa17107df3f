"""The custom ops: one contract, a slow truth in NumPy, and the kernels that follow them."""
