// Enough of CUDA on the CPU to run the kernels' own source under g++. Blocks run one after the other; a block's threads
// are fibers that run until they end or wait, in changing order. What would be undefined on a GPU stops the program:
// a barrier or a shuffle that some threads miss, shared memory used before it is written (it holds NaN; so do its
// surroundings, which must still be there after the block).
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <set>
#include <vector>

#define SL_EMULATE
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SL_SHARED(NAME) float *const NAME = emulate::shared_memory()

using std::max;
using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct Index {
    unsigned x;
};
using cudaStream_t = void *;
struct cudaFuncAttributes {};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };

inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t STACK = 1 << 16, GUARD = 256, SHARED_LIMIT = 48 << 10;
constexpr unsigned char POISON = 0xff;  // floats of it are NaN
enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    float slots[2];  // what it last offered to the other lanes: nobody gets more than one shuffle ahead
    int shuffles;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<unsigned char> memory;
inline int device = 0;
inline std::set<const void *> launched;  // kernels, since they were last counted

inline float *shared_memory() { return reinterpret_cast<float *>(memory.data() + GUARD); }

inline void stop(const char *what) {
    fprintf(stderr, "emulated block %u of %u: %s\n", blockIdx.x, gridDim.x, what);
    abort();
}

inline void wait(State state) {
    Fiber &fiber = fibers[threadIdx.x];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
    body();
    fibers[threadIdx.x].state = DONE;
}

inline void resume(unsigned thread) {
    threadIdx = {thread};
    if (fibers[thread].state == READY) swapcontext(&scheduler, &fibers[thread].context);
}

inline bool all(unsigned from, unsigned to, State state) {
    const auto in_it = [&](const Fiber &fiber) { return fiber.state == state; };
    return std::all_of(fibers.begin() + from, fibers.begin() + to, in_it);
}

inline void release(unsigned from, unsigned to) {
    for (unsigned i = from; i < to; ++i) fibers[i].state = READY;
}

// Lets waiting threads go on where all have arrived. Returns whether any are left.
inline bool meet() {
    const unsigned threads = blockDim.x;
    if (all(0, threads, DONE)) return false;
    if (all(0, threads, AT_BARRIER)) {
        release(0, threads);
        return true;
    }
    bool shuffled = false;
    for (unsigned warp = 0; warp < threads; warp += 32) {
        if (!all(warp, min(warp + 32, threads), AT_SHUFFLE)) continue;
        release(warp, min(warp + 32, threads));
        shuffled = true;
    }
    if (!shuffled) stop("some threads wait for others that are elsewhere or gone");
    return true;
}

inline void run_block(size_t shared) {
    memory.assign(shared + 2 * GUARD, POISON);
    for (unsigned i = 0; i < blockDim.x; ++i) {
        Fiber &fiber = fibers[i];
        fiber.state = READY;
        fiber.shuffles = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    bool forwards = true;
    do {
        for (unsigned i = 0; i < blockDim.x; ++i) resume(forwards ? i : blockDim.x - 1 - i);
        forwards = !forwards;
    } while (meet());
    const auto intact = [&](size_t from) {
        const auto poison = [](unsigned char c) { return c == POISON; };
        return std::all_of(memory.begin() + from, memory.begin() + from + GUARD, poison);
    };
    if (!intact(0) || !intact(GUARD + shared)) stop("it wrote outside its shared memory");
}

}  // namespace emulate

// How many different kernels have run since the last call. For the tests.
extern "C" __attribute__((weak)) int emulated_kernels() {
    const size_t count = emulate::launched.size();
    emulate::launched.clear();
    return (int)count;
}

extern "C" __attribute__((weak)) int emulated_device() { return emulate::device; }

inline void __syncthreads() { emulate::wait(emulate::AT_BARRIER); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    emulate::Fiber &fiber = emulate::fibers[threadIdx.x];
    const int slot = fiber.shuffles++ % 2;
    fiber.slots[slot] = value;
    emulate::wait(emulate::AT_SHUFFLE);
    return emulate::fibers[threadIdx.x ^ mask].slots[slot];
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, void *, Arguments... arguments) {
    if (grid < 1 || grid > 0x7fffffff || block < 1 || block > 1024 || block % 32) return cudaErrorInvalidValue;
    if (shared > emulate::SHARED_LIMIT) return cudaErrorInvalidValue;
    if (emulate::fibers.size() < (size_t)block) emulate::fibers.resize(block);
    emulate::launched.insert(reinterpret_cast<const void *>(kernel));
    gridDim = {(unsigned)grid};
    blockDim = {(unsigned)block};
    emulate::body = [&] { kernel(Parameters(arguments)...); };
    for (int64_t i = 0; i < grid; ++i) {
        blockIdx = {(unsigned)i};
        emulate::run_block(shared);
    }
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int *device) {
    *device = emulate::device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidDevice;
    emulate::device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, void (*)()) { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "emulated error";
}
