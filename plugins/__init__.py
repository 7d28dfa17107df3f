"""Custom ops: contract, NumPy reference, CUDA kernels and TensorRT plugins."""
