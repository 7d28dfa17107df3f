"""TensorRT engines: built, stamped, gated and run."""
