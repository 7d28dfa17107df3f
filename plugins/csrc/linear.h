// Linear interpolation along one axis, with the arithmetic of maskrcnn.imaging.preprocess.linear_taps.

#ifndef MASKRCNN_LINEAR_H
#define MASKRCNN_LINEAR_H

#include "device.h"

namespace maskrcnn {

// Positions and weight that pixel `index` reads when `size_in` values are interpolated to `size_out` pixels.
struct Lerp {
    int low, high;
    float weight;  // of high
};

__host__ __device__ inline Lerp lerp_at(int index, int size_in, int size_out) {
    float position = fmaxf(fmaf(float(index) + 0.5f, quotient(float(size_in), float(size_out)), -0.5f), 0.f);
    int low = int(position) < size_in - 1 ? int(position) : size_in - 1;
    int high = low + 1 < size_in - 1 ? low + 1 : size_in - 1;
    return {low, high, fminf(fmaxf(position - float(low), 0.f), 1.f)};
}

}  // namespace maskrcnn

#endif
