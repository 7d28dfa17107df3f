// The part of CUDA C++ that the kernels use, for three compilers: nvcc, NVRTC (which has no standard headers), and a
// host C++ compiler, for which a header of the tests emulates the GPU. Needs no headers of TensorRT or torch.

#ifndef MASKRCNN_DEVICE_H
#define MASKRCNN_DEVICE_H

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(MASKRCNN_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif
#endif

namespace maskrcnn {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Bits of half-precision numbers, which are only converted; that needs no header.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

__host__ __device__ inline uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

__host__ __device__ inline float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

__host__ __device__ inline float to_float(float value) { return value; }

__host__ __device__ inline float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

__host__ __device__ inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u;
    uint32_t mantissa = value.bits & 0x3ffu;
    if (exponent == 31u) return float_of(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0u) return float_of(sign | bits_of(float(mantissa) * 0x1p-24f));
    return float_of(sign | (exponent + 112u) << 23 | mantissa << 13);
#endif
}

// Rounds to nearest, ties to even, like the hardware; values beyond the range become infinite.
__host__ __device__ inline void from_float(float value, float &result) { result = value; }

__host__ __device__ inline void from_float(float value, BFloat16 &result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits = bits_of(value);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    result.bits = is_nan ? uint16_t(0x7fff) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

__host__ __device__ inline void from_float(float value, Half &result) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        result.bits = 0x7fff;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more
        result.bits = uint16_t(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {  // below 2^-14: this addition rounds to a multiple of 2^-24
        result.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    } else {
        result.bits = uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
    }
#endif
}

// Products and quotients that no compiler fuses: comparisons with a threshold must give the same result everywhere.
__host__ __device__ inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

__host__ __device__ inline float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// Keeps the compiler from splitting up the computation of an offset, to add its summands to each address anew.
__device__ inline void keep(uint64_t &offset) {
#if defined(__CUDA_ARCH__)
    asm("" : "+l"(offset));
#else
    (void)offset;
#endif
}

// W neighbouring elements, moved in one transaction; the address is a multiple of their size.
template <class T, int W>
struct alignas(W * sizeof(T)) Vector {
    T values[W];
};

template <class T, int W>
__device__ inline void load(const T *from, float (&to)[W]) {
    Vector<T, W> all = *reinterpret_cast<const Vector<T, W> *>(from);
    for (int i = 0; i < W; i++) to[i] = to_float(all.values[i]);
}

}  // namespace maskrcnn

#endif
