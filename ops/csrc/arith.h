// The arithmetic of one element, shared by the CUDA kernels and the CPU library.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SL_FN __host__ __device__ __forceinline__
#else
#define SL_FN inline __attribute__((always_inline))
#endif

// Storage types: two bytes without arithmetic; all arithmetic is in float.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

SL_FN float to_float(float v) { return v; }

SL_FN float to_float(bf16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

SL_FN float to_float(fp16 v) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(v.bits));
#else  // by bits: not every compiler has a type for it
    const uint32_t sign = (uint32_t)(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    if (exponent == 0) {
        const float small = (float)fraction * 0x1p-24f;
        memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
#endif
}

template <class T>
SL_FN T from_float(float v);

template <>
SL_FN float from_float<float>(float v) {
    return v;
}

template <>
SL_FN bf16 from_float<bf16>(float v) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return {(uint16_t)(v == v ? rounded : 0x7fc0u)};
#endif
}

template <>
SL_FN fp16 from_float<fp16>(float v) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(v))};
#else
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};   // NaN
    if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // rounds to infinity
    if (magnitude < 0x38800000) {  // subnormal: next to a half, the last bit of a float is worth 2^-24
        float small;
        memcpy(&small, &magnitude, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return {(uint16_t)(sign | (bits - 0x3f000000))};
    }
    return {(uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13)};  // ties to even
#endif
}

// Activations. `argument` is what goes in; the slope of the piecewise linear ones follows from the sign of what came
// out, so that the argument need not be kept.
constexpr bool piecewise_linear(int act) { return act == LINEAR || act == RELU || act == LRELU; }

constexpr float SELU_SCALE = 1.0507009873554805f;  // Klambauer et al. 2017, "Self-Normalizing Neural Networks", eq. 2
constexpr float SELU_ALPHA = 1.6732632423543772f;

SL_FN float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// V is float, or for the piecewise linear ones also a vector of floats.
template <int ACT, class V>
SL_FN V activate(V v, float alpha) {
    if constexpr (ACT == RELU) return v < 0 ? V{} : v;  // so that NaN stays NaN
    if constexpr (ACT == LRELU) return v > 0 ? v : v * alpha;
    if constexpr (ACT == TANH) return tanhf(v);
    if constexpr (ACT == SIGMOID) return sigmoid(v);
    if constexpr (ACT == ELU) return v > 0 ? v : expm1f(v);
    if constexpr (ACT == SELU) return SELU_SCALE * (v > 0 ? v : SELU_ALPHA * expm1f(v));
    if constexpr (ACT == SOFTPLUS) return v > 20 ? v : log1pf(expf(v));
    if constexpr (ACT == SWISH) return v * sigmoid(v);
    return v;
}

// d activate / d argument, at `v`: the argument, or for the piecewise linear ones anything of the result's sign.
template <int ACT, class V>
SL_FN V slope(V v, float alpha) {
    const V one = V{} + 1.0f;
    if constexpr (ACT == RELU) return v > 0 ? one : V{};
    if constexpr (ACT == LRELU) return v > 0 ? one : one * alpha;
    if constexpr (ACT == TANH) return 1 - tanhf(v) * tanhf(v);
    if constexpr (ACT == SIGMOID) return sigmoid(v) * (1 - sigmoid(v));
    if constexpr (ACT == ELU) return v > 0 ? 1 : expf(v);
    if constexpr (ACT == SELU) return SELU_SCALE * (v > 0 ? 1 : SELU_ALPHA * expf(v));
    if constexpr (ACT == SOFTPLUS) return v > 20 ? 1 : sigmoid(v);
    if constexpr (ACT == SWISH) return sigmoid(v) * (1 + v * (1 - sigmoid(v)));
    return one;
}

// Along one axis, which inputs and which taps make output `o`: inputs first .. first + count - 1, taps tap, tap + up, ...
// of the filter as it is correlated. (The sample at position q of the zero-inserted, padded axis is input
// (q - pad) / up where that divides.)
struct Taps {
    int64_t first;
    int32_t tap, count;
};

SL_FN Taps taps_of(int64_t o, int64_t size, int32_t taps, int32_t up, int32_t down, int32_t pad) {
    int64_t q = o * down - pad;  // of the filter's first tap, counted from the first sample
    int64_t first = q > 0 ? (q + up - 1) / up : 0;
    int64_t last = q + taps - 1 < 0 ? -1 : (q + taps - 1) / up;
    if (last > size - 1) last = size - 1;
    return {first, (int32_t)(first * up - q), last < first ? 0 : (int32_t)(last - first + 1)};
}
