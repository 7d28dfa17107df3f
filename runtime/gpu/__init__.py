"""GPU memory, streams and arrays without PyTorch."""
