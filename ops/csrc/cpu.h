// What the files of the CPU library share.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <new>
#include <exception>
#include <type_traits>

#include "arith.h"

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// A vector, or one element, as floats; V says which. (As a template argument, vec loses its attributes: memory is always
// read and written as vec itself.)
template <class V, class T>
INLINE V load(const T *p) {
    if constexpr (sizeof(V) == 4) return to_float(*p);
    else if constexpr (sizeof(T) == 4) return *(const vec *)p;
    else if constexpr (std::is_same<T, bf16>::value) return (V)(__builtin_convertvector(*(const halves *)p, bits) << 16);
#ifdef __AVX512F__
    else return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    else {
        float lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = to_float(p[i]);
        return *(const vec *)lanes;
    }
#endif
}

template <class V, class T>
INLINE void store(T *p, V v) {
    if constexpr (sizeof(V) == 4) *p = from_float<T>(v);
    else if constexpr (sizeof(T) == 4) *(vec *)p = v;
#ifdef __AVX512BF16__
    else if constexpr (std::is_same<T, bf16>::value) _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
    else if constexpr (std::is_same<T, bf16>::value) {
        const bits b = (bits)v, rounded = b + 0x7fff + ((b >> 16) & 1);  // as in from_float<bf16>
        *(halves *)p = __builtin_convertvector((v == v ? rounded >> 16 : bits{} + 0x7fc0), halves);
    }
#ifdef __AVX512F__
    else _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    else
        for (int i = 0; i < LANES; i++) p[i] = from_float<T>(v[i]);
#endif
}

// Memory that ends with its owner, in whole cache lines.
struct Buffer {
    float *data;
    explicit Buffer(int64_t floats) : data((float *)aligned_alloc(64, (floats * 4 + 127) / 64 * 64)) {
        if (!data) throw std::bad_alloc();
    }
    Buffer(int64_t floats, float value) : Buffer(floats) { std::fill(data, data + floats, value); }
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
};

constexpr int OUT_OF_MEMORY = 1;

// Runs `work(i)` for i < count on as many threads. What is thrown leaves only after all have ended.
template <class Work>
void in_parallel(int64_t count, int threads, Work work) {
    bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < count; i++) {
        try {
            work(i);
        } catch (const std::exception &) {
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

// Runs `work()`, which may throw when memory is short, and returns the error code.
template <class Work>
int guarded(Work work) {
    try {
        work();
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    }
    return 0;
}
