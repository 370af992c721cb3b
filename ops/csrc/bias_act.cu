// Scale, noise, bias, activation, gain and clamp on CUDA, and the gradient of it all in one pass over the tensors.
//
// A tensor is [n, b, a]: a is the axis that is contiguous in memory (pixels, or channels with channels_last) and b the
// other one. A block takes a tile of it: `lanes` neighbouring threads take 16 bytes each along a, and such rows of
// threads go down b in turns. What depends on a alone (noise, or scale and bias) is read once per tile. The backward
// pass sums over a by shuffles between lanes, and over b in registers and then between the rows of threads; a second
// kernel adds up the tiles' partial sums. There are no atomics: the same input gives the same bits.
#include "launch.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int LANES = 32;             // at most; a power of two, so that a row of threads lies within a warp
// Blocks, several for each place on the largest GPU: more only means more sums. Tests lower it.
#ifndef SL_BLOCKS
#define SL_BLOCKS 4096
#endif
constexpr int SUM_THREADS = 512;
constexpr int SUM_ROWS = 16;

struct Tiling {
    int64_t n, a, b;
    int64_t blocks_a, blocks_b;  // of one of the n
    int64_t turns;
    int32_t lanes, rows;  // lanes * rows = THREADS
};

// Where the partial sums of the backward pass go, or null: of g and of g * x, over a [n, b, blocks_a] and over b
// [n, blocks_b, a].
struct Partial {
    float *over_a, *over_a_x, *over_b, *over_b_x;
};

// A thread's place in its tile: its first element along a, and its row of threads.
struct Place {
    int64_t n, block_a, block_b, a, b;
    int32_t lane, row;
};

__device__ __forceinline__ Place place_of(const Tiling &t, int V) {
    Place at;
    int64_t index = blockIdx.x;
    at.block_a = split(index, t.blocks_a);
    at.block_b = split(index, t.blocks_b);
    at.n = index;
    at.lane = threadIdx.x & (t.lanes - 1);
    at.row = threadIdx.x / t.lanes;
    at.a = (at.block_a * t.lanes + at.lane) * V;
    at.b = at.block_b * t.turns * t.rows + at.row;
    return at;
}

// Calls f with the activation as a compile-time constant: one branch for V elements.
template <bool SMOOTH, class F>
__device__ __forceinline__ void with_activation(int act, F f) {
    if constexpr (!SMOOTH) {
        if (act == LRELU) {
            f(std::integral_constant<int, LRELU>());
        } else if (act == RELU) {
            f(std::integral_constant<int, RELU>());
        } else {
            f(std::integral_constant<int, LINEAR>());
        }
    } else {
        switch (act) {
            case TANH: return f(std::integral_constant<int, TANH>());
            case SIGMOID: return f(std::integral_constant<int, SIGMOID>());
            case ELU: return f(std::integral_constant<int, ELU>());
            case SELU: return f(std::integral_constant<int, SELU>());
            case SOFTPLUS: return f(std::integral_constant<int, SOFTPLUS>());
            case SWISH: return f(std::integral_constant<int, SWISH>());
        }
    }
}

// What makes the argument: v = x * scale + noise + bias. Of the V elements of a thread along a, and of one b.
template <int V, bool CHANNELS_LAST>
struct Operands {
    const float *scale, *noise, *bias;  // of this n
    float scale_a[V], shift_a[V];       // channels_last: scale and bias; otherwise noise in shift_a
    float scale_b, shift_b;             // channels_last: noise in shift_b; otherwise scale and bias

    __device__ __forceinline__ Operands(const BiasAct &args, const Place &at, bool inside) {
        scale = args.scale ? args.scale + at.n * args.c : nullptr;
        noise = args.noise ? args.noise + (args.noise_batch ? at.n * args.p : 0) : nullptr;
        bias = args.bias;
        const float *shift = CHANNELS_LAST ? bias : noise;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            scale_a[v] = CHANNELS_LAST && scale && inside ? scale[at.a + v] : 1;
            shift_a[v] = shift && inside ? shift[at.a + v] : 0;
        }
    }
    __device__ __forceinline__ void read(int64_t b) {
        const float *shift = CHANNELS_LAST ? noise : bias;
        scale_b = !CHANNELS_LAST && scale ? scale[b] : 1;
        shift_b = shift ? shift[b] : 0;
    }
    __device__ __forceinline__ float scale_of(int v) const { return CHANNELS_LAST ? scale_a[v] : scale_b; }
    __device__ __forceinline__ float argument(float x, int v) const {
        const float noise_of = CHANNELS_LAST ? shift_b : shift_a[v], bias_of = CHANNELS_LAST ? shift_a[v] : shift_b;
        return x * scale_of(v) + noise_of + bias_of;
    }
};

template <class T, int V, bool CHANNELS_LAST, bool SMOOTH>
__global__ void __launch_bounds__(THREADS) forward(BiasAct args, Tiling t) {
    constexpr int AHEAD = SMOOTH ? 2 : 4;  // loads in flight; fewer copies of the long code of smooth activations
    const Place at = place_of(t, V);
    if (at.a >= t.a) return;
    Operands<V, CHANNELS_LAST> operands(args, at, true);
    const float limit = args.clamp < 0 ? INFINITY : args.clamp;
    const int64_t start = at.n * t.b * t.a + at.a;
    for (int64_t turn = 0; turn < t.turns; turn += AHEAD) {
        Chunk<T, V> x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int64_t b = at.b + (turn + i) * t.rows;
            if (turn + i < t.turns && b < t.b) x[i] = Chunk<T, V>::load((const T *)args.x + start + b * t.a);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int64_t b = at.b + (turn + i) * t.rows;
            if (turn + i >= t.turns || b >= t.b) break;
            operands.read(b);
            float y[V];
            x[i].unpack(y);
            with_activation<SMOOTH>(args.act, [&](auto act) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float argument = operands.argument(y[v], v);
                    const float out = activate<decltype(act)::value>(argument, args.alpha) * args.gain;
                    y[v] = out > limit ? limit : out < -limit ? -limit : out;  // NaN stays
                }
            });
            Chunk<T, V>::of(y).store((T *)args.out + start + b * t.a);
        }
    }
}

__device__ __forceinline__ float sum_lanes(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Adds up the rows' values of each column of the tile, and writes them to `to` [a].
template <int V>
__device__ __forceinline__ void sum_rows_of_tile(const float (&values)[V], const Tiling &t, const Place &at,
                                                 float *to) {
    SL_SHARED(shared);
    const int width = t.lanes * V;
    __syncthreads();  // the previous sum has been read
#pragma unroll
    for (int v = 0; v < V; ++v) shared[at.row * width + v * t.lanes + at.lane] = values[v];
    __syncthreads();
    const int64_t first = at.block_a * width;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        if (first + i >= t.a) break;
        const int column = i % V * t.lanes + i / V;
        float sum = 0;
        for (int row = 0; row < t.rows; ++row) sum += shared[row * width + column];
        to[first + i] = sum;
    }
}

template <class T, int V, bool CHANNELS_LAST, bool SMOOTH>
__global__ void __launch_bounds__(THREADS, 2) backward(BiasAct args, Tiling t, Partial partial) {
    constexpr int AHEAD = SMOOTH ? 1 : 2;  // times up to three loads in flight
    const Place at = place_of(t, V);
    const bool inside = at.a < t.a;
    Operands<V, CHANNELS_LAST> operands(args, at, inside);
    const bool has_x = SMOOTH || partial.over_a_x || partial.over_b_x;
    const bool has_y = !SMOOTH && (args.act != LINEAR || args.clamp >= 0);
    // A saturated y was rounded to its dtype: so is the limit that it is compared with. Nothing is >= NaN.
    const float limit = args.clamp < 0 ? NAN : SMOOTH ? args.clamp : to_float(from_float<T>(args.clamp));
    const float sign = args.gain < 0 ? -1 : 1;
    const int64_t start = at.n * t.b * t.a + at.a;
    float over_b[V] = {}, over_b_x[V] = {};
    for (int64_t turn = 0; turn < t.turns; turn += AHEAD) {
        Chunk<T, V> dy[AHEAD], x[AHEAD], y[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int64_t b = at.b + (turn + i) * t.rows, offset = start + b * t.a;
            dy[i] = x[i] = y[i] = {};
            if (!inside || turn + i >= t.turns || b >= t.b) continue;
            dy[i] = Chunk<T, V>::load((const T *)args.dy + offset);
            if (has_x) x[i] = Chunk<T, V>::load((const T *)args.x + offset);
            if (has_y) y[i] = Chunk<T, V>::load((const T *)args.y + offset);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            // No thread leaves before the shuffles: those outside the tensor add zeros.
            const int64_t b = at.b + (turn + i) * t.rows;
            const bool valid = inside && turn + i < t.turns && b < t.b;
            operands.read(valid ? b : 0);
            float g[V], its_x[V], its_y[V];
            dy[i].unpack(g);
            x[i].unpack(its_x);
            y[i].unpack(its_y);
            with_activation<SMOOTH>(args.act, [&](auto act) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    float from = its_y[v] * sign, out = its_y[v];
                    if constexpr (SMOOTH) {
                        from = operands.argument(its_x[v], v);
                        out = activate<decltype(act)::value>(from, args.alpha) * args.gain;
                    }
                    const float gradient = g[v] * args.gain * slope<decltype(act)::value>(from, args.alpha);
                    g[v] = !valid || fabsf(out) >= limit ? 0 : gradient;
                }
            });
            float over_a = 0, over_a_x = 0, dx[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                dx[v] = g[v] * operands.scale_of(v);
                over_a += g[v];
                over_b[v] += g[v];
                const float product = valid ? g[v] * its_x[v] : 0;
                (CHANNELS_LAST ? over_b_x[v] : over_a_x) += product;
            }
            if (valid && args.out) Chunk<T, V>::of(dx).store((T *)args.out + start + b * t.a);
            const int64_t place = (at.n * t.b + b) * t.blocks_a + at.block_a;
            if (partial.over_a) {
                over_a = sum_lanes(over_a, t.lanes);
                if (valid && at.lane == 0) partial.over_a[place] = over_a;
            }
            if (partial.over_a_x) {
                over_a_x = sum_lanes(over_a_x, t.lanes);
                if (valid && at.lane == 0) partial.over_a_x[place] = over_a_x;
            }
        }
    }
    const int64_t place = (at.n * t.blocks_b + at.block_b) * t.a;
    if (partial.over_b) sum_rows_of_tile<V>(over_b, t, at, partial.over_b + place);
    if (partial.over_b_x) sum_rows_of_tile<V>(over_b_x, t, at, partial.over_b_x + place);
}

// out [count] = sum over n and over the last axis of partial [n, count, length]; `lanes` threads for each.
__global__ void __launch_bounds__(SUM_THREADS) sum_last(const float *partial, float *out, int64_t n, int64_t count,
                                                        int64_t length, int lanes) {
    const int64_t i = ((int64_t)blockIdx.x * SUM_THREADS + threadIdx.x) / lanes;
    float sum = 0;
#pragma unroll 4
    for (int64_t k = threadIdx.x & (lanes - 1); k < n * length; k += lanes) {
        int64_t outer = k;
        const int64_t inner = split(outer, length);
        if (i < count) sum += partial[(outer * count + i) * length + inner];
    }
    sum = sum_lanes(sum, lanes);
    if (i < count && (threadIdx.x & (lanes - 1)) == 0) out[i] = sum;
}

// out [n, count] = sum over the middle axis of partial [n, length, count]; `rows` threads for each.
__global__ void __launch_bounds__(SUM_THREADS) sum_middle(const float *partial, float *out, int64_t count,
                                                          int64_t length, int64_t blocks, int rows) {
    SL_SHARED(shared);
    const int columns = SUM_THREADS / rows, column = threadIdx.x % columns, row = threadIdx.x / columns;
    int64_t n = blockIdx.x;
    const int64_t i = split(n, blocks) * columns + column;
    const float *from = partial + n * length * count + i;
    float sum = 0;
    if (i < count) {
#pragma unroll 8
        for (int64_t k = row; k < length; k += rows) sum += from[k * count];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (row > 0 || i >= count) return;
    for (int k = 1; k < rows; ++k) sum += shared[k * columns + column];
    out[n * count + i] = sum;
}

int power_of_two(int64_t at_least, int most) {
    int out = 1;
    while (out < at_least && out < most) out *= 2;
    return out;
}

// Of one pixel, channels are contiguous either way.
bool channels_last(const BiasAct &args) { return args.channels_last || args.p == 1; }

Tiling tiling_of(const BiasAct &args, int V) {
    Tiling t;
    t.n = args.n;
    t.a = channels_last(args) ? args.c : args.p;
    t.b = channels_last(args) ? args.p : args.c;
    t.lanes = power_of_two(t.a / V, LANES);
    t.rows = THREADS / t.lanes;
    t.blocks_a = ceil_div(t.a / V, t.lanes);
    const int64_t turns = ceil_div(t.b, t.rows), all = t.n * t.blocks_a * turns;
    t.turns = all <= SL_BLOCKS / 4 ? 1 : min(turns, max((int64_t)4, all / SL_BLOCKS));
    t.blocks_b = ceil_div(t.b, t.rows * t.turns);
    return t;
}

template <class T>
bool wide(const BiasAct &args) {
    bool out = (channels_last(args) ? args.c : args.p) % WIDE<T> == 0;
    for (const void *tensor : {args.x, args.y, args.dy, (const void *)args.out}) out = out && aligned16(tensor);
    return out;
}

// Calls f(the kernels' V, CHANNELS_LAST and SMOOTH, as compile-time constants).
template <class T, class F>
int choose(const BiasAct &args, F f) {
    const auto rest = [&](auto V) {
        const auto smooth = [&](auto last) {
            return piecewise_linear(args.act) ? f(V, last, std::false_type()) : f(V, last, std::true_type());
        };
        return channels_last(args) ? smooth(std::true_type()) : smooth(std::false_type());
    };
    return wide<T>(args) ? rest(std::integral_constant<int, WIDE<T>>()) : rest(std::integral_constant<int, 1>());
}

template <class T>
int run_forward(const BiasAct &args, void *stream) {
    return choose<T>(args, [&](auto V, auto last, auto smooth) {
        const Tiling t = tiling_of(args, V);
        return launch(forward<T, V(), last(), smooth()>, t.n * t.blocks_b * t.blocks_a, THREADS, 0, stream, args, t);
    });
}

// The sums that are wanted, where their partial sums go, and how many there are of them.
struct Sums {
    const Tiling t;
    const bool last, batch;
    float *dbias, *dscale, *dnoise;  // partial sums
    int64_t used;                    // of the workspace, in floats

    Sums(const BiasAct &args, const Tiling &tiling, float *workspace)
        : t(tiling), last(channels_last(args)), batch(args.noise_batch || args.n == 1), used(0) {
        dbias = place(args.dbias, workspace, last, args.n == 1);
        dscale = place(args.dscale, workspace, last, true);
        dnoise = place(args.dnoise, workspace, !last, batch);
    }

    Partial partial() const {
        return last ? Partial{dnoise, nullptr, dbias, dscale} : Partial{dbias, dscale, dnoise, nullptr};
    }

    // From the partial sums to `out` [n or 1, size].
    int finish(const float *from, float *out, bool over_b, bool each_n, void *stream) const {
        if (from == out) return 0;
        if (over_b) {
            const int64_t length = each_n ? t.blocks_b : t.n * t.blocks_b;
            const int rows = power_of_two(length, SUM_ROWS);
            const int64_t blocks = ceil_div(t.a, SUM_THREADS / rows);
            const size_t shared = SUM_THREADS * sizeof(float);
            return launch(sum_middle, (each_n ? t.n : 1) * blocks, SUM_THREADS, shared, stream, from, out, t.a, length,
                          blocks, rows);
        }
        const int64_t n = each_n ? 1 : t.n, count = each_n ? t.n * t.b : t.b;
        const int lanes = power_of_two(n * t.blocks_a, LANES);
        return launch(sum_last, ceil_div(count * lanes, SUM_THREADS), SUM_THREADS, 0, stream, from, out, n, count,
                      t.blocks_a, lanes);
    }

private:
    // Null where not wanted; `out` itself where one tile makes the whole sum.
    float *place(float *out, float *workspace, bool over_b, bool each_n) {
        if (!out || (each_n && (over_b ? t.blocks_b : t.blocks_a) == 1)) return out;
        float *at = workspace + used;
        used += over_b ? t.n * t.blocks_b * t.a : t.n * t.b * t.blocks_a;
        return at;
    }
};

template <class T>
int run_backward(const BiasAct &args, float *workspace, void *stream) {
    return choose<T>(args, [&](auto V, auto last, auto smooth) {
        const Tiling t = tiling_of(args, V);
        const Sums sums(args, t, workspace);
        const size_t shared = THREADS * V * sizeof(float);
        int error = launch(backward<T, V(), last(), smooth()>, t.n * t.blocks_b * t.blocks_a, THREADS, shared, stream,
                           args, t, sums.partial());
        if (!error) error = sums.finish(sums.dbias, args.dbias, last, args.n == 1, stream);
        if (!error) error = sums.finish(sums.dscale, args.dscale, last, true, stream);
        if (!error) error = sums.finish(sums.dnoise, args.dnoise, !last, sums.batch, stream);
        return error;
    });
}

bool empty(const BiasAct &args) { return args.n * args.c * args.p == 0; }

// Sums over nothing.
int clear_sums(const BiasAct &args, void *stream) {
    const auto clear = [&](float *sum, int64_t count) {
        if (!sum || count == 0) return cudaSuccess;
        return cudaMemsetAsync(sum, 0, count * sizeof(float), static_cast<cudaStream_t>(stream));
    };
    cudaError_t error = clear(args.dbias, args.c);
    if (error == cudaSuccess) error = clear(args.dscale, args.n * args.c);
    if (error == cudaSuccess) error = clear(args.dnoise, (args.noise_batch ? args.n : 1) * args.p);
    return error;
}

}  // namespace

extern "C" int sl_bias_act_forward(const BiasAct *args, int device, void *stream) {
    if (empty(*args)) return 0;
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    switch (args->dtype) {
        case F32: return run_forward<float>(*args, stream);
        case BF16: return run_forward<bf16>(*args, stream);
        case F16: return run_forward<fp16>(*args, stream);
    }
    return cudaErrorInvalidValue;
}

// Enough for 16-byte accesses and for single elements: which of them it will be depends on addresses.
extern "C" int64_t sl_bias_act_workspace(const BiasAct *args) {
    if (empty(*args)) return 0;
    const int V = args->dtype == F32 ? WIDE<float> : WIDE<bf16>;
    const int64_t narrow = Sums(*args, tiling_of(*args, 1), nullptr).used;
    const int64_t wide = Sums(*args, tiling_of(*args, V), nullptr).used;
    return (int64_t)sizeof(float) * max(narrow, wide);
}

extern "C" int sl_bias_act_backward(const BiasAct *args, void *workspace, int device, void *stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    if (empty(*args)) return clear_sums(*args, stream);
    switch (args->dtype) {
        case F32: return run_backward<float>(*args, static_cast<float *>(workspace), stream);
        case BF16: return run_backward<bf16>(*args, static_cast<float *>(workspace), stream);
        case F16: return run_backward<fp16>(*args, static_cast<float *>(workspace), stream);
    }
    return cudaErrorInvalidValue;
}
