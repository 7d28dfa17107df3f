"""Running models: one `Detector` for every kind of model file.

>>> from maskrcnn.runtime import Detector
>>> detector = Detector.load("runs/train-1/model.onnx")
>>> detections = detector.detect([image])  # uint8 [H, W, 3] RGB

Importing this package needs NumPy only; a backend's library is imported when a model is loaded.
"""

from maskrcnn.runtime.backends.base import Backend, TensorSpec
from maskrcnn.runtime.detector import BACKENDS, Detector

__all__ = ["BACKENDS", "Backend", "Detector", "TensorSpec"]
