// What the kernels share: 16-byte chunks, division of indices, launches on a device and stream.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "arith.h"

// Dynamic shared memory as floats. The CPU emulation (tests/emulate) brings its own.
#ifndef SL_SHARED
#define SL_SHARED(NAME) extern __shared__ __align__(16) float NAME[]
#endif

constexpr int64_t MAX_GRID = 0x7fffffff;  // blocks along x

// Elements in 16 bytes: the widest access there is.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

// V elements, loaded and stored at once: one, or 16 bytes of them.
template <class T, int V>
struct Chunk {
    static_assert(V == 1 || V == WIDE<T>);
    using Raw = std::conditional_t<V == 1, T, uint4>;
    Raw raw;

    static __device__ __forceinline__ Chunk load(const T *from) { return {*reinterpret_cast<const Raw *>(from)}; }

    static __device__ __forceinline__ Chunk of(const float (&values)[V]) {
        T parts[V];
#pragma unroll
        for (int v = 0; v < V; ++v) parts[v] = from_float<T>(values[v]);
        Chunk out;
        memcpy(&out.raw, parts, sizeof(Raw));
        return out;
    }

    __device__ __forceinline__ void store(T *to) const { *reinterpret_cast<Raw *>(to) = raw; }

    __device__ __forceinline__ void unpack(float (&values)[V]) const {
        T parts[V];
        memcpy(parts, &raw, sizeof(Raw));
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = to_float(parts[v]);
    }
};

inline bool aligned16(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns value % by and leaves value / by. 64-bit division takes about 100 instructions, 32-bit division 20.
__device__ __forceinline__ int64_t split(int64_t &value, int64_t by) {
    int64_t quotient;
    if (((value | by) >> 32) == 0) {
        quotient = (uint32_t)value / (uint32_t)by;
    } else {
        quotient = value / by;
    }
    const int64_t rest = value - quotient * by;
    value = quotient;
    return rest;
}

// Makes `device` current while it lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != device) {
            error = cudaSetDevice(device);
            changed = error == cudaSuccess;
        }
        if (error != cudaSuccess) cudaGetLastError();  // told once: not again by the next launch
    }
    ~OnDevice() {
        if (changed) cudaSetDevice(before);
    }
    OnDevice(const OnDevice &) = delete;
    cudaError_t error;

private:
    int before = 0;
    bool changed = false;
};

// The emulation has a `launch` of its own: <<<>>> is not C++.
#ifndef SL_EMULATE
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, void *stream,
           Arguments... arguments) {
    kernel<<<(unsigned)grid, block, shared, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
    return cudaGetLastError();
}
#endif
