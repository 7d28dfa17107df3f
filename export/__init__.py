"""Export from PyTorch to ONNX, and passes over the ONNX graph. `maskrcnn.runtime` never imports this package."""
