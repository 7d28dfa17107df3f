"""Passes over an exported ONNX graph."""
