"""Kinds of values on the benchmarks' command lines."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A number of things, 1 or more."""
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Batch sizes, as 1,4."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: batch sizes are 1 or more")
    return found


def size_hw(text: str) -> tuple[int, int]:
    """Height and width of images, as 800x1088."""
    height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    if height % 32 or width % 32 or min(height, width) < 64:
        raise argparse.ArgumentTypeError(f"{text}: sides are multiples of 32, at least 64")
    return height, width


def sizes_hw(text: str) -> list[tuple[int, int]]:
    """Several sizes, as 800x1088,800x1344."""
    return [size_hw(part) for part in text.split(",")]
