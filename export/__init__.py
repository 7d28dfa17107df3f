"""PyTorch → ONNX, and passes over the ONNX graph. Hands on files only; `maskrcnn.runtime` never imports it."""
