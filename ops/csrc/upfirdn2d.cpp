// upfirdn2d without inserted zeros and discarded samples. Channels-last images are filtered pixel by pixel, with vectors
// of channels; planes row by row, first along the rows, then across them.
#include <vector>

#include "cpu.h"

namespace {

// The filter as it is correlated, [fh, fw], gain included.
std::vector<float> table(const Upfirdn2d &a) {
    std::vector<float> out(a.fh * a.fw);
    for (int y = 0; y < a.fh; y++)
        for (int x = 0; x < a.fw; x++) {
            const int from_y = a.flip ? y : a.fh - 1 - y, from_x = a.flip ? x : a.fw - 1 - x;
            out[y * a.fw + x] = a.gain * (a.fy ? a.fy[from_y] * a.fx[from_x] : a.fx[from_y * a.fw + from_x]);
        }
    return out;
}

std::vector<Taps> rows_of(const Upfirdn2d &a) {
    std::vector<Taps> out(a.oh);
    for (int64_t oy = 0; oy < a.oh; oy++) out[oy] = taps_of(oy, a.h, a.fh, a.up_y, a.down_y, a.pad_y);
    return out;
}

std::vector<Taps> columns_of(const Upfirdn2d &a) {
    std::vector<Taps> out(a.ow);
    for (int64_t ox = 0; ox < a.ow; ox++) out[ox] = taps_of(ox, a.w, a.fw, a.up_x, a.down_x, a.pad_x);
    return out;
}

// One pixel, `WIDE` vectors of channels at a time.
template <class T, int WIDE>
INLINE void pixel(const Upfirdn2d &a, const float *weights, const T *corner, const Taps ty, const Taps tx, T *out) {
    vec sum[WIDE] = {};
    for (int i = 0; i < ty.count; i++) {
        const T *x = corner + i * a.w * a.c;
        const float *w = weights + (ty.tap + i * a.up_y) * a.fw + tx.tap;
        for (int j = 0; j < tx.count; j++, x += a.c, w += a.up_x)
            for (int v = 0; v < WIDE; v++) sum[v] += *w * load<vec>(x + v * LANES);
    }
    for (int v = 0; v < WIDE; v++) store<vec>(out + v * LANES, sum[v]);
}

template <class T>
INLINE void pixel_scalar(const Upfirdn2d &a, const float *weights, const T *corner, const Taps ty, const Taps tx,
                         T *out) {
    float sum = 0;
    for (int i = 0; i < ty.count; i++)
        for (int j = 0; j < tx.count; j++)
            sum += weights[(ty.tap + i * a.up_y) * a.fw + tx.tap + j * a.up_x] * to_float(corner[(i * a.w + j) * a.c]);
    *out = from_float<T>(sum);
}

constexpr int TAPS = 4;  // of the filters that networks use, along each axis

// The input rows that make an output row, and their taps. Rows outside the image are zeros that stand still.
template <class T>
struct Rows {
    const T *data[TAPS];
    int64_t step[TAPS];  // from a pixel to the next
    float weight[TAPS];
    Rows(const Upfirdn2d &a, const T *image, int64_t pixel, const Taps t, const float *fy, const T *zeros) {
        for (int i = 0; i < TAPS; i++) {
            const bool here = i < t.count;
            data[i] = here ? image + (t.first + i) * a.w * pixel : zeros;
            step[i] = here ? pixel : 0;
            weight[i] = here ? fy[t.tap + i * a.up_y] : 0;
        }
    }
};

// A separable filter, padded to TAPS x TAPS with zeros, as it is correlated; the gain is in fx.
struct Filter {
    float fx[TAPS] = {}, fy[TAPS] = {};
    explicit Filter(const Upfirdn2d &a) {
        for (int k = 0; k < a.fw; k++) fx[k] = a.gain * a.fx[a.flip ? k : a.fw - 1 - k];
        for (int k = 0; k < a.fh; k++) fy[k] = a.fy[a.flip ? k : a.fh - 1 - k];
    }
};

// An output row, for WIDE vectors of channels from `c` on: sums down the columns, then along the row, over a window of
// column sums that stays in the registers. With UP 2, two of the filter's taps meet samples, the others inserted zeros.
template <class T, int ROWS, int UP, int DOWN, int WIDE>
INLINE void row(const Upfirdn2d &a, const Rows<T> &rows, const float *fx, int64_t c, T *out) {
    constexpr int WINDOW = TAPS / UP;
    vec window[WINDOW][WIDE];
    auto column = [&](int64_t x, vec *sum) __attribute__((always_inline)) {
        if ((uint64_t)x >= (uint64_t)a.w) {
            for (int v = 0; v < WIDE; v++) sum[v] = vec{};
            return;
        }
        for (int v = 0; v < WIDE; v++) sum[v] = rows.weight[0] * load<vec>(rows.data[0] + x * rows.step[0] + (rows.step[0] ? c : 0) + v * LANES);
        for (int i = 1; i < ROWS; i++) {
            const T *p = rows.data[i] + x * rows.step[i] + (rows.step[i] ? c : 0);
            for (int v = 0; v < WIDE; v++) sum[v] += rows.weight[i] * load<vec>(p + v * LANES);
        }
    };
    auto advance = [&](int64_t x) __attribute__((always_inline)) {
        for (int k = 0; k + 1 < WINDOW; k++)
            for (int v = 0; v < WIDE; v++) window[k][v] = window[k + 1][v];
        column(x, window[WINDOW - 1]);
    };
    auto write = [&](const float *taps, T *to) __attribute__((always_inline)) {
        for (int v = 0; v < WIDE; v++) {
            vec sum = taps[0] * window[0][v];
            for (int k = 1; k < WINDOW; k++) sum += taps[k * UP] * window[k][v];
            store<vec>(to + c + v * LANES, sum);
        }
    };
    // The window begins at the first sample at or after the filter's first tap.
    int64_t at = UP == 1 ? -a.pad_x : -(a.pad_x >> 1);
    for (int k = 0; k < WINDOW; k++) column(at + k, window[k]);
    int64_t ox = 0;
    if (UP == 2 && a.pad_x % 2) {  // the first tap meets a zero
        write(fx + 1, out);
        ox = 1;
    }
    for (; ox < a.ow; ox += UP) {
        write(fx, out + ox * a.c);
        for (int i = 0; i < DOWN; i++) advance(at++ + WINDOW);
        if (UP == 2 && ox + 1 < a.ow) write(fx + 1, out + (ox + 1) * a.c);
    }
}

template <class T, int UP, int DOWN>
void four_taps_channels_last(const Upfirdn2d &a, int threads) {
    const Filter f(a);
    const std::vector<T> zeros(4 * LANES, T{});
    const std::vector<Taps> lines = rows_of(a);
    const int64_t band = 16, bands = (a.oh + band - 1) / band;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a.n * bands; i++) {
        const T *image = (const T *)a.x + i / bands * a.h * a.w * a.c;
        const int64_t begin = i % bands * band, end = std::min(begin + band, a.oh);
        // Channels outside, rows inside: of a narrow image, some channels of the rows in use stay in the first cache.
        for (int64_t c = 0; c < a.c;) {
            const bool wide = c + 4 * LANES <= a.c;
            for (int64_t oy = begin; oy < end; oy++) {
                const Rows<T> rows(a, image, a.c, lines[oy], f.fy, zeros.data());
                T *out = (T *)a.y + (i / bands * a.oh + oy) * a.ow * a.c;
                wide ? row<T, TAPS / UP, UP, DOWN, 4>(a, rows, f.fx, c, out)
                     : row<T, TAPS / UP, UP, DOWN, 1>(a, rows, f.fx, c, out);
            }
            c += wide ? 4 * LANES : LANES;
        }
    }
}

// Numbers of the lanes, for shuffles of two vectors: step apart from `first` on, or from both in turn.
struct Lanes {
    bits at;
    static Lanes every(int step, int first) {
        Lanes l;
        for (int i = 0; i < LANES; i++) l.at[i] = first + i * step;
        return l;
    }
    static Lanes interleaved(int first) {
        Lanes l;
        for (int i = 0; i < LANES; i++) l.at[i] = first + i / 2 + i % 2 * LANES;
        return l;
    }
};

INLINE vec shuffled(vec a, vec b, bits at) {
#ifdef __clang__
    vec out;
    for (int i = 0; i < LANES; i++) out[i] = at[i] < LANES ? a[at[i]] : b[at[i] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, at);
#endif
}

template <class T>
INLINE void store_part(T *row, int64_t width, int64_t at, vec v) {
    if (at + LANES <= width) return store<vec>(row + at, v);
    for (int64_t i = at; i < width; i++) row[i] = from_float<T>(v[i - at]);
}

// An output row of a plane: sums down the columns go to `line`, whose element 0 is the sample at the window's start and
// which holds zeros where there is no sample; then along the row.
template <class T, int UP, int DOWN>
INLINE void plane_row(const Upfirdn2d &a, const Rows<T> &rows, const float *fx, float *line, int64_t length, T *out) {
    const int64_t start = UP == 1 ? a.pad_x : a.pad_x >> 1;  // of the image in the line; negative where it is cropped
    int64_t x = std::max<int64_t>(0, -start);
    const int64_t end = std::min(a.w, length - start);
    auto column = [&](auto kind) __attribute__((always_inline)) {
        typedef decltype(kind) V;
        V sum = rows.weight[0] * load<V>(rows.data[0] + x * rows.step[0]);
        for (int i = 1; i < TAPS / UP; i++) sum += rows.weight[i] * load<V>(rows.data[i] + x * rows.step[i]);
        store<V>(line + start + x, sum);
    };
    for (; x + LANES <= end; x += LANES) column(vec{});
    for (; x < end; x++) column(0.0f);
    auto at = [&](int64_t i) __attribute__((always_inline)) { return load<vec>(line + i); };
    if constexpr (UP == 2) {
        const bool odd = a.pad_x % 2;  // the first tap meets a zero
        const float *first = fx + odd, *second = fx + !odd;
        const bits low = Lanes::interleaved(0).at, high = Lanes::interleaved(LANES / 2).at;
        for (int64_t j = 0; 2 * j < a.ow; j += LANES) {
            const vec even = first[0] * at(j) + first[2] * at(j + 1);
            const vec other = second[0] * at(j + !odd) + second[2] * at(j + !odd + 1);
            store_part(out, a.ow, 2 * j, shuffled(even, other, low));
            store_part(out, a.ow, 2 * j + LANES, shuffled(even, other, high));
        }
    } else if constexpr (DOWN == 2) {
        const bits even = Lanes::every(2, 0).at, odd = Lanes::every(2, 1).at;
        for (int64_t j = 0; j < a.ow; j += LANES) {
            const vec p = at(2 * j), q = at(2 * j + LANES), r = at(2 * j + 2), s = at(2 * j + 2 + LANES);
            store_part(out, a.ow, j, fx[0] * shuffled(p, q, even) + fx[1] * shuffled(p, q, odd) +
                                         fx[2] * shuffled(r, s, even) + fx[3] * shuffled(r, s, odd));
        }
    } else {
        for (int64_t j = 0; j < a.ow; j += LANES)
            store_part(out, a.ow, j, fx[0] * at(j) + fx[1] * at(j + 1) + fx[2] * at(j + 2) + fx[3] * at(j + 3));
    }
}

template <class T, int UP, int DOWN>
void four_taps_planes(const Upfirdn2d &a, int threads) {
    const Filter f(a);
    const std::vector<T> zeros(LANES, T{});
    const std::vector<Taps> lines = rows_of(a);
    const int64_t length = a.ow * DOWN / UP + 4 * LANES + 2 * TAPS;
    const int64_t planes = a.n * a.c;
    in_parallel(threads, threads, [&](int64_t part) {
        std::vector<float> line(length, 0.0f);
        for (int64_t plane = planes * part / threads; plane < planes * (part + 1) / threads; plane++)
            for (int64_t oy = 0; oy < a.oh; oy++) {
                const Rows<T> rows(a, (const T *)a.x + plane * a.h * a.w, 1, lines[oy], f.fy, zeros.data());
                plane_row<T, UP, DOWN>(a, rows, f.fx, line.data(), length, (T *)a.y + (plane * a.oh + oy) * a.ow);
            }
    });
}

template <class T, int UP, int DOWN>
void four_taps(const Upfirdn2d &a, int threads) {
    a.channels_last ? four_taps_channels_last<T, UP, DOWN>(a, threads) : four_taps_planes<T, UP, DOWN>(a, threads);
}

// Does what the networks need, and says whether it was that.
template <class T>
bool common(const Upfirdn2d &a, int threads) {
    if (!a.fy || a.fw > TAPS || a.fh > TAPS || (a.channels_last && a.c % LANES)) return false;
    if (a.up_x != a.up_y || a.down_x != a.down_y || a.up_x * a.down_x > 2) return false;
    if (a.up_x == 2) four_taps<T, 2, 1>(a, threads);
    else if (a.down_x == 2) four_taps<T, 1, 2>(a, threads);
    else four_taps<T, 1, 1>(a, threads);
    return true;
}

template <class T>
void channels_last(const Upfirdn2d &a, int threads) {
    const std::vector<float> weights = table(a);
    const std::vector<Taps> columns = columns_of(a), lines = rows_of(a);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t n = 0; n < a.n; n++)
        for (int64_t oy = 0; oy < a.oh; oy++) {
            const Taps ty = lines[oy];
            for (int64_t ox = 0; ox < a.ow; ox++) {
                const Taps tx = columns[ox];
                const T *corner = (const T *)a.x + ((n * a.h + ty.first) * a.w + tx.first) * a.c;
                T *out = (T *)a.y + ((n * a.oh + oy) * a.ow + ox) * a.c;
                int64_t c = 0;
                for (; c + 4 * LANES <= a.c; c += 4 * LANES) pixel<T, 4>(a, weights.data(), corner + c, ty, tx, out + c);
                for (; c + LANES <= a.c; c += LANES) pixel<T, 1>(a, weights.data(), corner + c, ty, tx, out + c);
                for (; c < a.c; c++) pixel_scalar(a, weights.data(), corner + c, ty, tx, out + c);
            }
        }
}

// out[i] = (add ? out[i] : 0) + the sum over k < K of weights[k] * rows[k][i]
template <int K>
INLINE void combine(const float *const *rows, const float *weights, int64_t count, float *__restrict out, bool add) {
    const float *__restrict r[4] = {rows[0], rows[K > 1], rows[K > 2 ? 2 : 0], rows[K > 3 ? 3 : 0]};
    const float w0 = weights[0], w1 = weights[K > 1], w2 = weights[K > 2 ? 2 : 0], w3 = weights[K > 3 ? 3 : 0];
    auto sum = [&](int64_t i) __attribute__((always_inline)) {
        float v = w0 * r[0][i];
        if (K > 1) v += w1 * r[1][i];
        if (K > 2) v += w2 * r[2][i];
        if (K > 3) v += w3 * r[3][i];
        return v;
    };
    if (add)
        for (int64_t i = 0; i < count; i++) out[i] += sum(i);
    else
        for (int64_t i = 0; i < count; i++) out[i] = sum(i);
}

// The same for any number of rows; zeros for none.
void combine(const std::vector<const float *> &rows, const std::vector<float> &weights, int64_t count, float *out,
             bool add) {
    const int64_t all = rows.size();
    if (!all && !add) std::fill(out, out + count, 0.0f);
    for (int64_t k = 0; k < all; k += 4) {
        const float *const *r = rows.data() + k, *w = weights.data() + k;
        switch (std::min<int64_t>(all - k, 4)) {
            case 1: combine<1>(r, w, count, out, add || k); break;
            case 2: combine<2>(r, w, count, out, add || k); break;
            case 3: combine<3>(r, w, count, out, add || k); break;
            default: combine<4>(r, w, count, out, add || k);
        }
    }
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Filters along a row. `read` takes in a row; `filter` then gives its [ow] results for some taps.
struct Across {
    const Upfirdn2d &a;
    int64_t first, samples, steps;  // input of samples[0]; up-sampled results before `down` skips some
    std::vector<float> in, full, phase;
    std::vector<const float *> rows;
    std::vector<float> weights;

    explicit Across(const Upfirdn2d &a) : a(a) {
        steps = a.up_x > 1 ? (a.ow - 1) * a.down_x + 1 : a.ow;
        first = floor_div(-a.pad_x, a.up_x);
        // Without up-sampling the samples are dealt to `down` rows, so that every tap reads neighbours.
        samples = a.up_x > 1 ? (steps + a.fw) / a.up_x + 2 : a.ow + a.fw / a.down_x + 1;
        in.resize(samples * (a.up_x > 1 ? 1 : a.down_x));
        if (a.up_x > 1) full.resize(steps + a.up_x), phase.resize(steps / a.up_x + 1);
    }

    template <class T>
    void read(const T *row) {
        const int64_t deal = a.up_x > 1 ? 1 : a.down_x, begin = std::max<int64_t>(first, 0);
        const int64_t end = std::min(a.w, first + samples * deal);
        if (deal == 1) {
            float *__restrict out = in.data();
            std::fill(out, out + std::min(samples, std::max<int64_t>(begin - first, 0)), 0.0f);
            for (int64_t i = begin; i < end; i++) out[i - first] = to_float(row[i]);
            std::fill(out + std::min(samples, std::max<int64_t>(end - first, 0)), out + samples, 0.0f);
            return;
        }
        std::fill(in.begin(), in.end(), 0.0f);
        for (int r = 0; r < deal; r++) {
            const int64_t skip = std::max<int64_t>(0, floor_div(deal - 1 - first - r, deal));
            const int64_t count = std::min(samples, floor_div(a.w - first - r + deal - 1, deal));
            for (int64_t m = skip; m < count; m++) in[r * samples + m] = to_float(row[first + m * deal + r]);
        }
    }

    void filter(const float *taps, float *out, bool add) {
        if (a.up_x == 1) {
            rows.clear(), weights.clear();
            for (int k = 0; k < a.fw; k++)
                rows.push_back(in.data() + k % a.down_x * samples + k / a.down_x), weights.push_back(taps[k]);
            return combine(rows, weights, a.ow, out, add);
        }
        for (int64_t p = 0; p < a.up_x && p < steps; p++) {
            int k = (a.pad_x - p) % a.up_x;
            k += k < 0 ? a.up_x : 0;
            const float *sample = in.data() + (p + k - a.pad_x) / a.up_x - first;
            rows.clear(), weights.clear();
            for (; k < a.fw; k += a.up_x) rows.push_back(sample++), weights.push_back(taps[k]);
            const int64_t count = (steps - p + a.up_x - 1) / a.up_x;
            combine(rows, weights, count, phase.data(), false);
            for (int64_t j = 0; j < count; j++) full[j * a.up_x + p] = phase[j];
        }
        for (int64_t j = 0; j < a.ow; j++) out[j] = (add ? out[j] : 0) + full[j * a.down_x];
    }
};

// A plane's rows, filtered along themselves: the last few are kept, as neighbours need them again.
template <class T>
void plane_rows(const Upfirdn2d &a, const std::vector<Taps> &lines, const T *x, T *y, const float *weights, int64_t begin,
                int64_t end, Across &across) {
    const int64_t ring = a.fh / a.up_y + 2;
    std::vector<float> kept(a.fy ? ring * a.ow : 0), sum(a.ow), taps;
    std::vector<int64_t> held(ring, -1);
    std::vector<const float *> rows;
    for (int64_t oy = begin; oy < end; oy++) {
        const Taps t = lines[oy];
        rows.clear(), taps.clear();
        if (!a.fy) std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t i = 0; i < t.count; i++) {
            const int64_t row = t.first + i, tap = t.tap + i * a.up_y;
            if (!a.fy) {  // not separable: every tap filters along the row in its own way
                across.read(x + row * a.w);
                across.filter(weights + tap * a.fw, sum.data(), true);
                continue;
            }
            float *slot = kept.data() + row % ring * a.ow;
            if (held[row % ring] != row) {
                across.read(x + row * a.w);
                across.filter(weights, slot, false);
                held[row % ring] = row;
            }
            rows.push_back(slot), taps.push_back(a.fy[a.flip ? tap : a.fh - 1 - tap]);
        }
        if (a.fy) combine(rows, taps, a.ow, sum.data(), false);
        T *__restrict out = y + oy * a.ow;
        for (int64_t i = 0; i < a.ow; i++) out[i] = from_float<T>(sum[i]);
    }
}

template <class T>
void planes(const Upfirdn2d &a, int threads) {
    std::vector<float> weights = table(a);
    if (a.fy)  // along the rows, gain included
        for (int k = 0; k < a.fw; k++) weights[k] = a.gain * a.fx[a.flip ? k : a.fw - 1 - k];
    const std::vector<Taps> lines = rows_of(a);
    const int64_t band = 64, bands = (a.oh + band - 1) / band, units = a.n * a.c * bands;
    in_parallel(threads, threads, [&](int64_t part) {
        Across across(a);
        for (int64_t i = units * part / threads; i < units * (part + 1) / threads; i++) {
            const int64_t plane = i / bands, begin = i % bands * band;
            plane_rows(a, lines, (const T *)a.x + plane * a.h * a.w, (T *)a.y + plane * a.oh * a.ow, weights.data(),
                       begin, std::min(begin + band, a.oh), across);
        }
    });
}

template <class T>
void run(const Upfirdn2d &a, int threads) {
    if (common<T>(a, threads)) return;
    a.channels_last ? channels_last<T>(a, threads) : planes<T>(a, threads);
}

}  // namespace

extern "C" int sl_upfirdn2d(const Upfirdn2d *a, int threads, void *) {
    if (!a->n || !a->c || !a->oh || !a->ow) return 0;
    return guarded([&] {
        if (a->dtype == F32) return run<float>(*a, threads);
        if (a->dtype == BF16) return run<bf16>(*a, threads);
        return run<fp16>(*a, threads);
    });
}
