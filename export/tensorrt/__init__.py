"""TensorRT: the flavour of the ONNX graph for its parser, and a lint of graphs."""
