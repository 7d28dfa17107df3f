"""The ONNX graph as TensorRT's parser accepts it."""
