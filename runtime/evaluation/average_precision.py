"""Average precision of many detection lists at once: of resampled data, or of each image by itself.

The figure is COCO's: precision, made to fall with recall, averaged over 101 recalls. `accumulate` has the same for one
list with every digit of pycocotools; here the sum is over true positives instead of recalls, which may change the last.
"""

from __future__ import annotations

import numpy as np


def average_precision(true: np.ndarray, counted: np.ndarray, to_find: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Average precision `[N]` of N lists of detections, of which only the true positives are looked at.

    Args:
        true: `[N, P]` true positives up to and including each one.
        counted: `[N, P]` detections that count up to and including it; infinity where a list has fewer than P.
        to_find: `[N]` objects; without any the result is NaN.
        recalls: `[R]` ascending from 0 to 1 in even steps.
    """
    precision = np.divide(true, counted, out=np.zeros(true.shape), where=counted > 0)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = _reached(true / np.maximum(to_find, 1)[:, None], recalls)
    found = np.einsum("np,np->n", highest[:, :1], reached[:, :1])
    found += np.einsum("np,np->n", highest[:, 1:], reached[:, 1:] - reached[:, :-1])
    return np.where(to_find > 0, found / len(recalls), np.nan)


def _reached(recall: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """How many of the recalls are at most each value of `recall`: a look-up, and a step where rounding was wrong."""
    beyond = np.append(recalls, np.inf)
    guess = (recall * (len(recalls) - 1)).astype(np.int32)
    guess -= np.take(recalls, guess) > recall
    guess += np.take(beyond, guess + 1) <= recall
    return guess + 1
