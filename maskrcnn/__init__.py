"""Mask R-CNN from training data to the fastest engine a machine can run.

Importing this package loads nothing heavy: torch, ONNX Runtime and OpenVINO are imported by the
modules that use them, so that a deployment machine needs only the one it runs.
"""

__version__ = "0.1.0"
