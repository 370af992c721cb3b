// 3x3 convolutions with fewer multiplications, in float32 and channels-last: "same", stride 2, and stride-2 transposed;
// and their weights' gradients. Winograd's minimal filtering (Lavin and Gray 2016, "Fast Algorithms for Convolutional
// Neural Networks", section 4) with the points 0, 1, -1 and infinity only, whose rounding errors are about those of
// the plain sum. Tiles are transformed, multiplied and transformed back in blocks that stay in the cache.
#include "cpu.h"

namespace {

constexpr int ROWS = LANES == 16 ? 8 : 4;  // AVX2 has 16 registers, AVX-512 32; a divisor of LANES
static_assert(LANES % ROWS == 0, "blocks of rows lie within a vector");
constexpr int COLS = 2 * LANES;  // ROWS x COLS sums fit into the registers
constexpr int64_t BLOCK = 32;    // tiles transformed at once; a multiple of ROWS

// One-dimensional algorithms: `x` takes IN samples (the next tile begins STEP further, the first one FIRST before the
// image), `w` the 3 taps to MUL factors each; their products' sums over the channels give `y`'s OUT results. `y_adjoint`
// and `w_adjoint` are the transposes, for the gradient of the weights.

// Two results of a 3-tap filter from four multiplications instead of six: F(2, 3).
struct Same {
    enum { IN = 4, STEP = 2, FIRST = 1, OUT = 2, MUL = 4 };
    static INLINE void x(const vec *d, vec *v) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }
    static INLINE void w(const vec *g, vec *u) {
        vec even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
        u[0] = g[0];
        u[1] = even + odd;
        u[2] = even - odd;
        u[3] = g[2];
    }
    static INLINE void w_adjoint(const vec *u, vec *g) {
        vec even = (u[1] + u[2]) * 0.5f;
        g[0] = u[0] + even;
        g[1] = (u[1] - u[2]) * 0.5f;
        g[2] = u[3] + even;
    }
    static INLINE void y(const vec *m, vec *o) {
        o[0] = m[0] + m[1] + m[2];
        o[1] = m[1] - m[2] - m[3];
    }
    static INLINE void y_adjoint(const vec *o, vec *m) {
        m[0] = o[0];
        m[1] = o[0] + o[1];
        m[2] = o[0] - o[1];
        m[3] = -o[1];
    }
};

// Two results of stride 2 from five multiplications instead of six: the outer taps meet the even samples only, which is
// F(2, 2), and the middle tap the odd ones.
struct Down {
    enum { IN = 5, STEP = 4, FIRST = 0, OUT = 2, MUL = 5 };
    static INLINE void x(const vec *d, vec *v) {
        v[0] = d[0] - d[2];
        v[1] = d[2];
        v[2] = d[2] - d[4];
        v[3] = d[1];
        v[4] = d[3];
    }
    static INLINE void w(const vec *g, vec *u) {
        u[0] = g[0];
        u[1] = g[0] + g[2];
        u[2] = g[2];
        u[3] = u[4] = g[1];
    }
    static INLINE void w_adjoint(const vec *u, vec *g) {
        g[0] = u[0] + u[1];
        g[1] = u[3] + u[4];
        g[2] = u[1] + u[2];
    }
    static INLINE void y(const vec *m, vec *o) {
        o[0] = m[0] + m[1] + m[3];
        o[1] = m[1] - m[2] + m[4];
    }
    static INLINE void y_adjoint(const vec *o, vec *m) {
        m[0] = o[0];
        m[1] = o[0] + o[1];
        m[2] = -o[1];
        m[3] = o[0];
        m[4] = o[1];
    }
};

// The transpose of stride 2: four results from five multiplications instead of six. The even results are F(2, 2) of the
// outer taps, the odd ones the middle tap's products.
struct Up {
    enum { IN = 3, STEP = 2, FIRST = 1, OUT = 4, MUL = 5 };
    static INLINE void x(const vec *d, vec *v) {
        v[0] = d[0] - d[1];
        v[1] = d[1];
        v[2] = d[1] - d[2];
        v[3] = d[1];
        v[4] = d[2];
    }
    static INLINE void w(const vec *g, vec *u) {
        u[0] = g[2];
        u[1] = g[0] + g[2];
        u[2] = g[0];
        u[3] = u[4] = g[1];
    }
    static INLINE void y(const vec *m, vec *o) {
        o[0] = m[0] + m[1];
        o[1] = m[3];
        o[2] = m[1] - m[2];
        o[3] = m[4];
    }
};

// [COLUMNS, COLUMNS] to [RESULTS, RESULTS]: the one-dimensional step on every column, then on every row.
template <int COLUMNS, int RESULTS, class Step>
INLINE void both_axes(const vec *in, vec *out, Step step) {
    vec half[RESULTS * COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
        vec column[COLUMNS], result[RESULTS];
        for (int i = 0; i < COLUMNS; i++) column[i] = in[i * COLUMNS + j];
        step(column, result);
        for (int i = 0; i < RESULTS; i++) half[i * COLUMNS + j] = result[i];
    }
    for (int i = 0; i < RESULTS; i++) step(half + i * COLUMNS, out + i * RESULTS);
}

// C [ROWS, NV * LANES] = or += A B, where A[r, k] lies at A[r * row + k * step] and B's rows are `width` apart.
template <int NV, bool ADD>
INLINE void product(int64_t K, const float *A, int64_t row, int64_t step, const float *B, float *C, int64_t stride) {
    vec sum[ROWS][NV];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) sum[r][v] = vec{};
    for (int64_t k = 0; k < K; k++) {
        vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = load<vec>(B + (k * NV + v) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) sum[r][v] += A[r * row + k * step] * b[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) {
            float *c = C + r * stride + v * LANES;
            store<vec>(c, ADD ? load<vec>(c) + sum[r][v] : sum[r][v]);
        }
}

// Columns are held in panels of COLS (the last one may be LANES wide), each [K, width] without gaps.
template <bool ADD>
INLINE void panel_product(int64_t columns, int64_t c, int64_t K, const float *A, int64_t row, int64_t step,
                          const float *panel, float *C, int64_t stride) {
    if (columns - c >= COLS)
        product<2, ADD>(K, A, row, step, panel, C + c, stride);
    else
        product<1, ADD>(K, A, row, step, panel, C + c, stride);
}

INLINE int64_t panel_width(int64_t columns, int64_t c) { return std::min<int64_t>(columns - c / COLS * COLS, COLS); }

// Where (k, c) lies in panels over K rows.
INLINE int64_t in_panel(int64_t columns, int64_t c, int64_t K, int64_t k) {
    return c / COLS * COLS * K + k * panel_width(columns, c) + c % COLS;
}

struct Grid {  // of tiles over results [n, h, w]
    int64_t rows, columns, count;
    template <class F>
    static Grid of(F, int64_t n, int64_t h, int64_t w) {
        int64_t rows = (h + F::OUT - 1) / F::OUT, columns = (w + F::OUT - 1) / F::OUT;
        return {rows, columns, n * rows * columns};
    }
};

struct Window {  // a square of samples, its corner maybe outside the image
    int64_t n, y, x;
    static Window of(const Grid &g, int64_t tile, int step, int first) {
        return {tile / (g.rows * g.columns), tile / g.columns % g.rows * step - first, tile % g.columns * step - first};
    }
};

struct Image {
    float *data;
    int64_t h, w, c;
};

// Samples of one vector of channels; zeros outside the image.
template <int SIDE>
INLINE void read_window(const Image &image, const Window &at, int64_t c, vec *out) {
    const float *corner = image.data + ((at.n * image.h + at.y) * image.w + at.x) * image.c + c;
    bool inside = at.y >= 0 && at.x >= 0 && at.y + SIDE <= image.h && at.x + SIDE <= image.w;
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            bool here = inside || ((uint64_t)(at.y + i) < (uint64_t)image.h && (uint64_t)(at.x + j) < (uint64_t)image.w);
            out[i * SIDE + j] = here ? load<vec>(corner + (i * image.w + j) * image.c) : vec{};
        }
}

template <int SIDE>
INLINE void write_window(const Image &image, const Window &at, int64_t c, const vec *in) {
    float *corner = image.data + ((at.n * image.h + at.y) * image.w + at.x) * image.c + c;
    int64_t rows = std::min<int64_t>(SIDE, image.h - at.y), columns = std::min<int64_t>(SIDE, image.w - at.x);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) store<vec>(corner + (i * image.w + j) * image.c, in[i * SIDE + j]);
}

// Where tap k of the weight from channel `ci` to `co` lies.
struct Weight {
    float *data;
    int64_t co_stride, ci_stride;
    bool flip;
    INLINE float *at(int64_t co, int64_t ci, int k) const {
        return data + co * co_stride + ci * ci_stride + (flip ? 8 - k : k);
    }
};

// To be called by all threads of a team: the weights' factors U [MUL * MUL][panels over ci of co].
template <class F>
void transform_weights(const Weight &w, int64_t ci_count, int64_t co_count, float *U) {
    constexpr int M2 = F::MUL * F::MUL;
#pragma omp for collapse(2)
    for (int64_t co = 0; co < co_count; co += LANES)
        for (int64_t ci = 0; ci < ci_count; ci++) {
            float taps[9 * LANES];
            for (int lane = 0; lane < LANES; lane++)
                for (int k = 0; k < 9; k++) taps[k * LANES + lane] = *w.at(co + lane, ci, k);
            vec g[9], u[M2];
            for (int k = 0; k < 9; k++) g[k] = load<vec>(taps + k * LANES);
            both_axes<3, F::MUL>(g, u, F::w);
            float *to = U + in_panel(co_count, co, ci_count, ci);
            for (int i = 0; i < M2; i++) store<vec>(to + i * ci_count * co_count, u[i]);
        }
}

template <class F>
void convolve(const Winograd &a, int threads) {
    constexpr int M2 = F::MUL * F::MUL;
    const Image x{(float *)a.x, a.h, a.w, a.ci}, y{a.y, a.oh, a.ow, a.co};
    const Weight weight{(float *)a.weight, a.co_stride, a.ci_stride, a.flip != 0};
    const Grid grid = Grid::of(F(), a.n, a.oh, a.ow);
    // Rows a little longer than the channels: powers of two would fall into the same cache sets.
    const int64_t v_row = a.ci + LANES, m_row = a.co + LANES;
    Buffer U(M2 * a.ci * a.co), scratch(threads * M2 * BLOCK * (v_row + m_row));
#pragma omp parallel num_threads(threads)
    {
        transform_weights<F>(weight, a.ci, a.co, U.data);
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++) {
            float *V = scratch.data + part * M2 * BLOCK * (v_row + m_row), *M = V + M2 * BLOCK * v_row;
            for (int64_t first = part * BLOCK; first < grid.count; first += threads * BLOCK) {
                const int64_t count = std::min(BLOCK, grid.count - first);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t c = 0; c < a.ci; c += LANES) {
                        vec d[F::IN * F::IN], v[M2];
                        read_window<F::IN>(x, Window::of(grid, first + t, F::STEP, F::FIRST), c, d);
                        both_axes<F::IN, F::MUL>(d, v, F::x);
                        for (int i = 0; i < M2; i++) store<vec>(V + (i * BLOCK + t) * v_row + c, v[i]);
                    }
                for (int i = 0; i < M2; i++)
                    for (int64_t c = 0; c < a.co; c += COLS)
                        for (int64_t t = 0; t < count; t += ROWS)  // rows past `count` give products that nobody reads
                            panel_product<false>(a.co, c, a.ci, V + (i * BLOCK + t) * v_row, v_row, 1,
                                                 U.data + i * a.ci * a.co + c * a.ci, M + (i * BLOCK + t) * m_row, m_row);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t c = 0; c < a.co; c += LANES) {
                        vec m[M2], o[F::OUT * F::OUT];
                        for (int i = 0; i < M2; i++) m[i] = load<vec>(M + (i * BLOCK + t) * m_row + c);
                        both_axes<F::MUL, F::OUT>(m, o, F::y);
                        write_window<F::OUT>(y, Window::of(grid, first + t, F::OUT, 0), c, o);
                    }
            }
        }
    }
}

template <class F>
void weight_gradient(const Winograd &a, int threads) {
    constexpr int M2 = F::MUL * F::MUL;
    const Image x{(float *)a.x, a.h, a.w, a.ci}, y{a.y, a.oh, a.ow, a.co};
    const Weight weight{(float *)a.weight, a.co_stride, a.ci_stride, a.flip != 0};
    const Grid grid = Grid::of(F(), a.n, a.oh, a.ow);
    // Every pass over the sums costs as much as some tens of tiles: take more of them where the sums are many.
    const int64_t block = std::min<int64_t>((grid.count + 7) / 8 * 8, std::max<int64_t>(64, (a.ci + a.co) / 4));
    Buffer sums(M2 * a.ci * a.co, 0.0f), V(M2 * block * a.ci), D(M2 * block * a.co);
#pragma omp parallel num_threads(threads)
    {
        for (int64_t first = 0; first < grid.count; first += block) {
            const int64_t count = std::min(block, grid.count - first);
#pragma omp for
            for (int64_t t = 0; t < count; t++) {
                for (int64_t c = 0; c < a.ci; c += LANES) {
                    vec d[F::IN * F::IN], v[M2];
                    read_window<F::IN>(x, Window::of(grid, first + t, F::STEP, F::FIRST), c, d);
                    both_axes<F::IN, F::MUL>(d, v, F::x);
                    for (int i = 0; i < M2; i++) store<vec>(V.data + i * block * a.ci + c * block + t * LANES, v[i]);
                }
                for (int64_t c = 0; c < a.co; c += LANES) {
                    vec o[F::OUT * F::OUT], m[M2];
                    read_window<F::OUT>(y, Window::of(grid, first + t, F::OUT, 0), c, o);
                    both_axes<F::OUT, F::MUL>(o, m, F::y_adjoint);
                    for (int i = 0; i < M2; i++) store<vec>(D.data + i * block * a.co + in_panel(a.co, c, block, t), m[i]);
                }
            }
#pragma omp for collapse(2)
            for (int i = 0; i < M2; i++)
                for (int64_t c = 0; c < a.co; c += COLS)
                    for (int64_t r = 0; r < a.ci; r += ROWS)
                        panel_product<true>(a.co, c, count, V.data + i * block * a.ci + r / LANES * LANES * block + r % LANES,
                                            1, LANES, D.data + i * block * a.co + c * block,
                                            sums.data + (i * a.ci + r) * a.co, a.co);
        }
#pragma omp for collapse(2)
        for (int64_t co = 0; co < a.co; co += LANES)
            for (int64_t ci = 0; ci < a.ci; ci++) {
                vec u[M2], g[9];
                for (int i = 0; i < M2; i++) u[i] = load<vec>(sums.data + (i * a.ci + ci) * a.co + co);
                both_axes<F::MUL, 3>(u, g, F::w_adjoint);
                for (int k = 0; k < 9; k++)
                    for (int lane = 0; lane < LANES; lane++) *weight.at(co + lane, ci, k) = g[k][lane];
            }
    }
}

}  // namespace

extern "C" int sl_winograd_lanes() { return LANES; }

extern "C" int sl_winograd(const Winograd *a, int threads) {
    if (!a->n || !a->oh || !a->ow) return 0;
    return guarded([&] {
        if (a->kind == SAME) convolve<Same>(*a, threads);
        if (a->kind == DOWN) convolve<Down>(*a, threads);
        if (a->kind == UP) convolve<Up>(*a, threads);
    });
}

extern "C" int sl_winograd_weight(const Winograd *a, int threads) {
    return guarded([&] {
        if (a->kind == SAME) weight_gradient<Same>(*a, threads);
        if (a->kind == DOWN) weight_gradient<Down>(*a, threads);
    });
}
