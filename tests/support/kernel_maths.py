"""Arithmetic functions of the kernels on NumPy arrays: `cuda_on_cpu/maths.cpp`, compiled for the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import kernels_on_cpu
import numpy as np

TAP = np.dtype([("low", np.int32), ("high", np.int32), ("low_weight", np.float32), ("high_weight", np.float32)])
AXIS = np.dtype([("start", np.float32), ("bin", np.float32), ("samples", np.int32), ("size", np.int32)])
SPAN = np.dtype([("first", np.int32), ("last", np.int32)])
AXIS_CASE = np.dtype(
    [(name, np.float32) for name in ("low", "high", "scale")]
    + [(name, np.int32) for name in ("size", "bins", "ratio", "aligned")]
)
LEVEL_RULE = np.dtype(
    [(name, np.int32) for name in ("num_levels", "min_level", "canonical_level")]
    + [(name, np.float32) for name in ("canonical_size", "epsilon")]
)


class Maths:
    """The functions; arguments and results are arrays of the same length."""

    def __init__(self, folder: Path) -> None:
        csrc, headers = kernels_on_cpu.CSRC, kernels_on_cpu.HEADERS
        words = ["-O2", "-I", str(csrc), "-I", str(headers), str(headers / "maths.cpp")]
        self._library = ctypes.CDLL(str(kernels_on_cpu.compile_library(folder / "libmaths.so", words)))

    def _call(self, name: str, *arguments: np.ndarray | int, result: np.dtype | type, length: int) -> np.ndarray:
        found = np.empty(length, result)
        words = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
        getattr(self._library, name)(*words, found.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(length))
        return found

    def singles_from_halves(self, bits: np.ndarray) -> np.ndarray:
        """uint16 bits to float32."""
        return self._call("singles_from_halves", bits, result=np.float32, length=len(bits))

    def halves_from_singles(self, values: np.ndarray) -> np.ndarray:
        """float32 to uint16 bits."""
        return self._call("halves_from_singles", values, result=np.uint16, length=len(values))

    def singles_from_bfloat16s(self, bits: np.ndarray) -> np.ndarray:
        """uint16 bits to float32."""
        return self._call("singles_from_bfloat16s", bits, result=np.float32, length=len(bits))

    def bfloat16s_from_singles(self, values: np.ndarray) -> np.ndarray:
        """float32 to uint16 bits."""
        return self._call("bfloat16s_from_singles", values, result=np.uint16, length=len(values))

    def levels(self, sides: np.ndarray, **rule: float) -> np.ndarray:
        """The level of each box of (width, height) `[n, 2]`; `rule` has the fields of LEVEL_RULE."""
        widths, heights = np.ascontiguousarray(sides.astype(np.float32).T)
        rules = np.zeros(1, LEVEL_RULE)
        for name, value in rule.items():
            rules[name] = value
        return self._call("levels", widths, heights, rules, result=np.int32, length=len(widths))

    def taps(self, positions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """TAP of each position along an axis of the given number of pixels."""
        return self._call(
            "taps", positions.astype(np.float32), sizes.astype(np.int32), result=TAP, length=len(positions)
        )

    def axes(self, cases: np.ndarray) -> np.ndarray:
        """AXIS of each AXIS_CASE."""
        return self._call("axes", cases, result=AXIS, length=len(cases))

    def ranges(self, case: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each bin of one AXIS_CASE the number of samples in range, and of weighted samples outside it."""
        given, lost = np.empty((2, int(case["bins"])), np.int32)
        self._library.ranges(*(a.ctypes.data_as(ctypes.c_void_p) for a in (case, given, lost)))
        return given, lost

    def overlap(self, a: np.ndarray, b: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Whether the IoU of boxes `[n, 4]` float32 is greater than the thresholds `[n]` float32."""
        return self._call("overlap", a, b, thresholds, result=np.uint8, length=len(thresholds)).astype(bool)

    def spans(self, lows: np.ndarray, highs: np.ndarray, mask_size: int) -> np.ndarray:
        """SPAN of a mask's box along one axis."""
        return self._call("spans", lows, highs, mask_size, result=SPAN, length=len(lows))
