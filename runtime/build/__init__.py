"""Building engines with OpenVINO and TensorRT."""
