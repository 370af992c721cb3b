// Up-sample, pad, filter, down-sample on CUDA. Two kernels:
//
// `separable` is for what networks do: factors 1 or 2, up to 8 separable taps. A block filters a tile of the input
// down the columns, from global memory through registers into shared memory, then along the rows, from shared memory
// through registers to global memory. Columns come first because they do not care where a row starts: every access to
// global memory can take 16 aligned bytes, and the shift that padding brings is met in shared memory, where any word
// can be addressed. No sum is made twice but in the halo.
//
// `direct` sums the definition, for everything else: any factors, any filter, 2-D ones too.
#include "launch.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int SHARED = 48 << 10;  // bytes that every GPU grants a block unasked
constexpr int64_t MAX_SIDE = 1 << 28;  // so that coordinates in `separable` fit 32 bits

// One axis of `separable`. A tile starts at an output that is a multiple of UP, so that with UP 2 outputs alternate
// between two fixed sets of taps: `TABLE` holds them one after the other. Filters shorter than TAPS get zeros
// (by which an infinite input becomes NaN in a few outputs more than it should).
template <int UP_, int DOWN_, int TAPS>
struct Fir {
    static constexpr int UP = UP_, DOWN = DOWN_;
    static constexpr int K = UP == 2 ? TAPS / 2 + 1 : TAPS;  // inputs to one output
    static constexpr int TABLE = UP * K;
    static_assert(TABLE % 2 == 0, "two tables leave what follows them at a multiple of 16 bytes");
    static constexpr int ROWS = DOWN == 2 ? 4 : 8;  // of outputs that a thread makes in one go
    static constexpr int RUN = DOWN == 2 ? 2 : 4;   // the same along a row of pixels, where channels are contiguous

    // How many inputs make that many outputs.
    static constexpr __host__ __device__ int inputs(int outputs) {
        return UP == 2 ? (outputs + 1) / 2 + K - 1 : (outputs - 1) * DOWN + K;
    }
    // Where in the table input i's weight for output j is, or -1.
    static constexpr __host__ __device__ int weight(int i, int j) {
        const int k = i - j * DOWN / UP;
        return k < 0 || k >= K ? -1 : j % UP * K + k;
    }
    // The first input to output o, a multiple of UP.
    static __device__ __forceinline__ int first(int o, int pad) {
        return UP == 2 ? (o - pad + (pad & 1)) >> 1 : o * DOWN - pad;
    }
    static __device__ __forceinline__ void fill(float *table, const float *f, int taps, int pad, bool flip,
                                                float factor) {
        for (int i = threadIdx.x; i < TABLE; i += blockDim.x) {
            const int tap = UP == 2 ? i % K * 2 + (pad & 1) - i / K : i;
            table[i] = tap < 0 || tap >= taps ? 0 : f[flip ? tap : taps - 1 - tap] * factor;
        }
    }
};

// How `separable` cuts the work. An image is [h, w, channels]: with contiguous planes each plane is one, of 1 channel.
struct Tiling {
    int64_t tiles;                      // of all images
    int32_t h, w, oh, ow, channels;     // of an image
    int32_t tiles_c, tiles_x, tiles_y;  // of an image
    int32_t tile_c, tile_w, strips;     // of a tile: channels, output pixels along x, ROWS of them along y
    int32_t columns;                    // of a tile: inputs along x, times tile_c
    int32_t pitch, skew;                // of a row in shared memory
    int32_t align;                      // of a tile's first input along x
    int32_t wide_in, wide_out;          // 16 bytes at a time
};

struct Tile {
    int64_t image;
    int32_t c, x, y, in_x;  // first channel, output, and input along x
};

// Where a column is in a row of shared memory: every 32 columns some words are left out, so that neighbouring threads,
// which are 4, 8 or 16 columns apart, mostly fall into different banks. With planes 1 word, for access word by word
// (the shift of the padding allows no other); with contiguous channels 4, for 16 bytes at a time.
__device__ __forceinline__ int skewed(const Tiling &t, int column) { return column + (column >> 5) * t.skew; }

template <class F>
__device__ __forceinline__ Tile tile_of(const Tiling &t, int64_t index, int pad_x) {
    Tile tile;
    tile.c = (int)split(index, t.tiles_c) * t.tile_c;
    tile.x = (int)split(index, t.tiles_x) * t.tile_w;
    tile.y = (int)split(index, t.tiles_y) * t.strips * F::ROWS;
    tile.image = index;
    tile.in_x = F::first(tile.x, pad_x) & -t.align;
    return tile;
}

// From global memory: ROWS outputs down V neighbouring columns per turn, into shared memory.
template <class T, int V, class F>
__device__ __forceinline__ void filter_columns(const Upfirdn2d &a, const Tiling &t, const Tile &tile,
                                               const float *table, float *shared) {
    constexpr int INPUTS = F::inputs(F::ROWS);
    float weights[F::TABLE];
#pragma unroll
    for (int i = 0; i < F::TABLE; ++i) weights[i] = table[i];
    const int64_t row = (int64_t)t.w * t.channels;
    const T *image = static_cast<const T *>(a.x) + tile.image * t.h * row;
    const int chunks = t.columns / V;
    for (int unit = threadIdx.x; unit < t.strips * chunks; unit += blockDim.x) {
        const int strip = unit / chunks, column = (unit - strip * chunks) * V;
        const int pixel = column / t.tile_c, c = tile.c + column - pixel * t.tile_c;
        const int x = tile.in_x + pixel, y = F::first(tile.y + strip * F::ROWS, a.pad_y);
        const bool inside = x >= 0 && x < t.w && c < t.channels;
        const T *from = image + y * row + (int64_t)x * t.channels + c;
        Chunk<T, V> in[INPUTS];  // all loads before the first use
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
            in[i] = {};
            if (inside && y + i >= 0 && y + i < t.h) in[i] = Chunk<T, V>::load(from + i * row);
        }
        float out[F::ROWS][V] = {};
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
            float values[V];
            in[i].unpack(values);
#pragma unroll
            for (int j = 0; j < F::ROWS; ++j) {
                if (F::weight(i, j) < 0) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) out[j][v] += values[v] * weights[F::weight(i, j)];
            }
        }
        float *to = shared + strip * F::ROWS * t.pitch + skewed(t, column);  // V columns, a divisor of 32: one skew
        if (V > 1 && a.channels_last) {
#pragma unroll
            for (int j = 0; j < F::ROWS; ++j)
#pragma unroll
                for (int v = 0; v < V; v += 4)
                    *reinterpret_cast<float4 *>(to + j * t.pitch + v) =
                        float4{out[j][v], out[j][v + 1], out[j][v + 2], out[j][v + 3]};
        } else {
#pragma unroll
            for (int j = 0; j < F::ROWS; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v) to[j * t.pitch + v] = out[j][v];
        }
    }
}

// One channel per image: V outputs along x per turn, then the same further down.
template <class T, class F>
__device__ __forceinline__ void filter_rows_planes(const Upfirdn2d &a, const Tiling &t, const Tile &tile,
                                                   const float *table, const float *shared) {
    constexpr int V = WIDE<T>, INPUTS = F::inputs(V);
    const int across = t.tile_w / V, row_step = blockDim.x / across;
    const int x = tile.x + threadIdx.x % across * V, first_row = threadIdx.x / across;
    if (first_row >= row_step || x >= t.ow) return;
    float weights[F::TABLE];
#pragma unroll
    for (int i = 0; i < F::TABLE; ++i) weights[i] = table[i];
    int columns[INPUTS];
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) columns[i] = skewed(t, F::first(x, a.pad_x) - tile.in_x + i);
    T *to = static_cast<T *>(a.y) + tile.image * t.oh * t.ow + x;
    const int rows = min(t.strips * F::ROWS, t.oh - tile.y);
    for (int y = first_row; y < rows; y += row_step) {
        float out[V] = {};
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
            const float value = shared[y * t.pitch + columns[i]];
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (F::weight(i, j) >= 0) out[j] += value * weights[F::weight(i, j)];
        }
        Chunk<T, V>::of(out).store(to + (int64_t)(tile.y + y) * t.ow);
    }
}

// Contiguous channels: RUN outputs along x of V neighbouring channels per turn. Neighbouring threads take neighbouring
// channels, then rows (whose pitch keeps them apart in the banks), then runs.
template <class T, class F>
__device__ __forceinline__ void filter_rows_channels(const Upfirdn2d &a, const Tiling &t, const Tile &tile,
                                                     const float *table, const float *shared) {
    constexpr int V = WIDE<T>, INPUTS = F::inputs(F::RUN);
    float weights[F::TABLE];
#pragma unroll
    for (int i = 0; i < F::TABLE; ++i) weights[i] = table[i];
    const int chunks = t.tile_c / V, runs = t.tile_w / F::RUN;
    const int rows = min(t.strips * F::ROWS, t.oh - tile.y);
    T *image = static_cast<T *>(a.y) + tile.image * t.oh * t.ow * t.channels;
    for (int unit = threadIdx.x; unit < rows * runs * chunks; unit += blockDim.x) {
        const int place = unit / chunks, c = (unit - place * chunks) * V;
        const int run = place / rows, y = place - run * rows, x = tile.x + run * F::RUN;
        if (tile.c + c >= t.channels || x >= t.ow) continue;
        const float *row = shared + y * t.pitch;
        const int column = (F::first(x, a.pad_x) - tile.in_x) * t.tile_c + c;
        float out[F::RUN][V] = {};
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
            const float *from = row + skewed(t, column + i * t.tile_c);
            float values[V];
#pragma unroll
            for (int v = 0; v < V; v += 4) {
                const float4 four = *reinterpret_cast<const float4 *>(from + v);
                values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < F::RUN; ++j) {
                if (F::weight(i, j) < 0) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) out[j][v] += values[v] * weights[F::weight(i, j)];
            }
        }
        T *to = image + ((int64_t)(tile.y + y) * t.ow + x) * t.channels + tile.c + c;
#pragma unroll
        for (int j = 0; j < F::RUN; ++j)
            if (x + j < t.ow) Chunk<T, V>::of(out[j]).store(to + (int64_t)j * t.channels);
    }
}

// Sizes or addresses that do not allow 16 bytes: one output per turn, neighbours in neighbouring threads.
template <class T, class F>
__device__ __forceinline__ void filter_rows_narrow(const Upfirdn2d &a, const Tiling &t, const Tile &tile,
                                                   const float *table, const float *shared) {
    const int across = t.tile_w * t.tile_c, step = min(across, (int)blockDim.x), row_step = blockDim.x / step;
    const int rows = min(t.strips * F::ROWS, t.oh - tile.y), first_row = threadIdx.x / step;
    if (first_row >= row_step) return;
    T *image = static_cast<T *>(a.y) + tile.image * t.oh * t.ow * t.channels;
    for (int i = threadIdx.x % step; i < across; i += step) {
        const int pixel = i / t.tile_c, c = i - pixel * t.tile_c, x = tile.x + pixel;
        if (x >= t.ow || tile.c + c >= t.channels) continue;
        const float *weights = table + x % F::UP * F::K;
        const int column = (F::first(x - x % F::UP, a.pad_x) - tile.in_x) * t.tile_c + c;
        T *to = image + ((int64_t)tile.y * t.ow + x) * t.channels + tile.c + c;
        for (int y = first_row; y < rows; y += row_step) {
            float out = 0;
#pragma unroll
            for (int k = 0; k < F::K; ++k)
                out += shared[y * t.pitch + skewed(t, column + k * t.tile_c)] * weights[k];
            to[(int64_t)y * t.ow * t.channels] = from_float<T>(out);
        }
    }
}

template <class T, int UP, int DOWN, int TAPS>
__global__ void __launch_bounds__(THREADS) separable(Upfirdn2d a, Tiling t) {
    using F = Fir<UP, DOWN, TAPS>;
    SL_SHARED(shared);
    float *table_x = shared, *table_y = shared + F::TABLE, *rows = shared + 2 * F::TABLE;
    F::fill(table_x, a.fx, a.fw, a.pad_x, a.flip, a.gain);
    F::fill(table_y, a.fy, a.fh, a.pad_y, a.flip, 1);
    for (int64_t index = blockIdx.x; index < t.tiles; index += gridDim.x) {
        __syncthreads();  // the tables are there, the previous tile is done
        const Tile tile = tile_of<F>(t, index, a.pad_x);
        if (t.wide_in) {
            filter_columns<T, WIDE<T>, F>(a, t, tile, table_y, rows);
        } else {
            filter_columns<T, 1, F>(a, t, tile, table_y, rows);
        }
        __syncthreads();
        if (!t.wide_out) {
            filter_rows_narrow<T, F>(a, t, tile, table_x, rows);
        } else if (a.channels_last) {
            filter_rows_channels<T, F>(a, t, tile, table_x, rows);
        } else {
            filter_rows_planes<T, F>(a, t, tile, table_x, rows);
        }
    }
}

// V channels of one output pixel per turn.
template <class T, int V>
__global__ void __launch_bounds__(256) direct(Upfirdn2d a, int64_t units) {
    const int64_t pixel_step = a.channels_last ? a.c : 1, image_step = a.channels_last ? 1 : a.h * a.w;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; unit < units; unit += stride) {
        int64_t rest = unit, c = 0;
        if (a.channels_last) c = split(rest, a.c / V) * V;
        const int64_t ox = split(rest, a.ow), oy = split(rest, a.oh);
        if (!a.channels_last) c = split(rest, a.c);
        const Taps x = taps_of(ox, a.w, a.fw, a.up_x, a.down_x, a.pad_x);
        const Taps y = taps_of(oy, a.h, a.fh, a.up_y, a.down_y, a.pad_y);
        const T *from = static_cast<const T *>(a.x) + rest * a.c * a.h * a.w + c * image_step;
        float out[V] = {};
        for (int i = 0; i < y.count; ++i) {
            const int tap_y = y.tap + i * a.up_y, fy = a.flip ? tap_y : a.fh - 1 - tap_y;
            const float *fx = a.fy ? a.fx : a.fx + (int64_t)fy * a.fw;
            float sum[V] = {};
            for (int k = 0; k < x.count; ++k) {
                const int tap_x = x.tap + k * a.up_x;
                const float weight = fx[a.flip ? tap_x : a.fw - 1 - tap_x];
                float values[V];
                Chunk<T, V>::load(from + ((y.first + i) * a.w + x.first + k) * pixel_step).unpack(values);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += values[v] * weight;
            }
            const float weight = a.fy ? a.fy[fy] : 1;
#pragma unroll
            for (int v = 0; v < V; ++v) out[v] += sum[v] * weight;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] *= a.gain;
        Chunk<T, V>::of(out).store(static_cast<T *>(a.y) + unit * V);
    }
}

bool has_fast_path(const Upfirdn2d &a) {
    if (!a.fy || a.fw > 8 || a.fh > 8 || a.up_x != a.up_y || a.down_x != a.down_y) return false;
    if (a.up_x * a.down_x > 2 || a.up_x < 1 || a.down_x < 1) return false;
    for (int64_t side : {a.h, a.w, a.oh, a.ow, a.c})
        if (side > MAX_SIDE) return false;
    return a.pad_x > -MAX_SIDE && a.pad_x < MAX_SIDE && a.pad_y > -MAX_SIDE && a.pad_y < MAX_SIDE;
}

// Tiles of about one unit of `filter_columns` per thread, or four where a unit is one column.
template <class T, class F>
Tiling tiling_of(const Upfirdn2d &a) {
    Tiling t = {};
    t.h = (int)a.h, t.w = (int)a.w, t.oh = (int)a.oh, t.ow = (int)a.ow;
    t.channels = a.channels_last ? (int)a.c : 1;
    const bool x = aligned16(a.x), y = aligned16(a.y), channels = t.channels % WIDE<T> == 0;
    t.wide_in = x && (a.channels_last ? y && channels : t.w % WIDE<T> == 0);
    t.wide_out = y && (a.channels_last ? x && channels : t.ow % WIDE<T> == 0);
    const int V = t.wide_in ? WIDE<T> : 1, units = t.wide_in ? THREADS : 4 * THREADS;
    t.align = a.channels_last ? 1 : V;
    if (a.channels_last) {
        // 64 bytes of channels, more where the map is small; as many pixels as the rest allows.
        t.tile_c = min(t.channels, t.wide_in ? 4 * V : 32);
        const int in = units * V / t.tile_c, most = F::UP == 2 ? (in - F::K + 1) * 2 : (in - F::K) / F::DOWN + 1;
        t.tile_w = min(most / F::RUN, (int)ceil_div(t.ow, F::RUN)) * F::RUN;
        if (t.tile_w >= t.ow) t.tile_c = max(t.tile_c, min(t.channels, units / F::inputs(t.tile_w) * V));
    } else {
        // 16 chunks and a halo of two.
        t.tile_c = 1;
        t.tile_w = min(16 * WIDE<T> * F::UP / F::DOWN, (int)ceil_div(t.ow, WIDE<T>) * WIDE<T>);
    }
    t.columns = (int)ceil_div(F::inputs(t.tile_w) + t.align - 1, t.align) * t.align * t.tile_c;
    t.skew = a.channels_last ? 4 : 1;
    // Where threads of a warp read several rows, these fall between each other's banks.
    const int apart = a.channels_last ? 4 : WIDE<T> / 2, step = a.channels_last ? 8 : 2 * WIDE<T>;
    t.pitch = (int)ceil_div(t.columns + t.columns / 32 * t.skew, step) * step + apart;
    const int room = SHARED / (int)sizeof(float) - 2 * F::TABLE;
    const int fit = min(units * V / t.columns, room / (F::ROWS * t.pitch));
    t.strips = max(1, min(fit, (int)ceil_div(t.oh, F::ROWS)));
    t.tiles_c = (int)ceil_div(t.channels, t.tile_c);
    t.tiles_x = (int)ceil_div(t.ow, t.tile_w);
    t.tiles_y = (int)ceil_div(t.oh, t.strips * F::ROWS);
    t.tiles = a.n * a.c / t.channels * t.tiles_c * t.tiles_x * t.tiles_y;
    return t;
}

template <class T, int UP, int DOWN, int TAPS>
int run_separable(const Upfirdn2d &a, void *stream) {
    using F = Fir<UP, DOWN, TAPS>;
    const Tiling t = tiling_of<T, F>(a);
    const size_t shared = sizeof(float) * (2 * F::TABLE + (size_t)t.strips * F::ROWS * t.pitch);
    const int units = t.strips * t.columns / (t.wide_in ? WIDE<T> : 1);
    const int block = (int)min((int64_t)THREADS, ceil_div(units, 32) * 32);
    return launch(separable<T, UP, DOWN, TAPS>, min(t.tiles, MAX_GRID), block, shared, stream, a, t);
}

template <class T, int TAPS>
int run_separable(const Upfirdn2d &a, void *stream) {
    if (a.up_x == 2) return run_separable<T, 2, 1, TAPS>(a, stream);
    if (a.down_x == 2) return run_separable<T, 1, 2, TAPS>(a, stream);
    return run_separable<T, 1, 1, TAPS>(a, stream);
}

template <class T, int V>
int run_direct(const Upfirdn2d &a, void *stream) {
    const int64_t units = a.n * a.c * a.oh * a.ow / V;
    return launch(direct<T, V>, min(ceil_div(units, 256), MAX_GRID), 256, 0, stream, a, units);
}

template <class T>
int run(const Upfirdn2d &a, void *stream) {
    if (has_fast_path(a)) {
        return max(a.fw, a.fh) <= 4 ? run_separable<T, 4>(a, stream) : run_separable<T, 8>(a, stream);
    }
    const bool wide = a.channels_last && a.c % WIDE<T> == 0 && aligned16(a.x) && aligned16(a.y);
    return wide ? run_direct<T, WIDE<T>>(a, stream) : run_direct<T, 1>(a, stream);
}

__global__ void nothing() {}

}  // namespace

extern "C" int sl_upfirdn2d(const Upfirdn2d *args, int device, void *stream) {
    if (args->n * args->c * args->oh * args->ow == 0) return 0;
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    switch (args->dtype) {
        case F32: return run<float>(*args, stream);
        case BF16: return run<bf16>(*args, stream);
        case F16: return run<fp16>(*args, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int sl_check(int device) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    cudaFuncAttributes attributes;  // to know them, it has to load the kernel
    cudaFuncGetAttributes(&attributes, nothing);
    return cudaGetLastError();
}

extern "C" const char *sl_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
