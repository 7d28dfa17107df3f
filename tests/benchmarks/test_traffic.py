"""The counted memory requests of RoIAlign's kernels."""

import numpy as np
import pytest
import traffic
from kernels_on_cpu import compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return traffic.build(tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("element_bytes", [4, 2])
def test_every_way_reads_sixteen_pixels_for_an_output_and_writes_it_once(library, element_bytes):
    rois = traffic.random_rois(3)
    outputs = len(rois) * traffic.CHANNELS * 7 * 7
    loads, stores = traffic.trace(library, 0, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs, outputs)
    loads, stores = traffic.trace(library, 1, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs * 32 / 28, outputs)  # four of 32 lanes have no bin
    loads, stores = traffic.trace(library, 2, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs / 4, outputs)  # four channels at once


def test_lines_and_sectors_of_a_warp_that_reads_one_after_the_other(library):
    # Channels last: 32 lanes of 16 bytes are 512 bytes, at a multiple of 512.
    loads, _ = traffic.trace(library, 2, 4, np.array([[100, 100, 300, 300]], np.float32), 7)
    assert loads[2] / loads[0] == 16
    assert loads[3] / loads[0] == 4
