// Scale, noise, bias, activation, gain and clamp in one pass, and their gradient in one pass.
#include "cpu.h"

namespace {

// Work is cut into units, runs of pixels of one image, whatever the number of threads: sums are added up within a unit
// and then over the units, always in the same order. Planes are best read from end to end.
constexpr int64_t UNIT = 32768;  // elements, about, of a channels-last unit

struct Units {
    int64_t pixels, per_image, count;  // pixels of a unit (the last of an image may have fewer)
    explicit Units(const BiasAct &a) {
        pixels = a.channels_last ? std::max<int64_t>(UNIT / a.c, 16) : std::max<int64_t>(a.n * a.p / 4, 4096);
        pixels = std::min(a.p, pixels);
        per_image = (a.p + pixels - 1) / pixels;
        count = a.n * per_image;
    }
};

// One unit: where it lies, and its factors, with ones and zeros in place of what is missing.
struct Unit {
    int64_t n, first, pixels;
    const float *scale, *bias, *noise;  // [c], [c], [pixels]
    Unit(const BiasAct &a, const Units &units, int64_t i, const float *ones, const float *zeros) {
        n = i / units.per_image;
        first = i % units.per_image * units.pixels;
        pixels = std::min(units.pixels, a.p - first);
        scale = a.scale ? a.scale + n * a.c : ones;
        bias = a.bias ? a.bias : zeros;
        noise = a.noise ? a.noise + (a.noise_batch ? n * a.p : 0) + first : zeros;
    }
};

template <class V>
INLINE V clamped(V v, float limit) {  // NaN stays NaN
    const V high = V{} + limit;
    v = v < -high ? -high : v;
    return v > high ? high : v;
}

template <class V>
INLINE V magnitude(V v) {
    return v < 0 ? -v : v;
}

// The piecewise linear activations have loops of their own, in vectors; the others share one.
constexpr int SMOOTH = -1;

float smooth_activation(int act, float v) {
    switch (act) {
        case TANH: return activate<TANH>(v, 0);
        case SIGMOID: return activate<SIGMOID>(v, 0);
        case ELU: return activate<ELU>(v, 0);
        case SELU: return activate<SELU>(v, 0);
        case SOFTPLUS: return activate<SOFTPLUS>(v, 0);
        default: return activate<SWISH>(v, 0);
    }
}

float smooth_slope(int act, float v) {
    switch (act) {
        case TANH: return slope<TANH>(v, 0);
        case SIGMOID: return slope<SIGMOID>(v, 0);
        case ELU: return slope<ELU>(v, 0);
        case SELU: return slope<SELU>(v, 0);
        case SOFTPLUS: return slope<SOFTPLUS>(v, 0);
        default: return slope<SWISH>(v, 0);
    }
}

template <int ACT, class V>
INLINE V activate_(int act, V v, float alpha) {
    if constexpr (ACT == SMOOTH) return smooth_activation(act, v);
    else return activate<ACT>(v, alpha);
}

template <int ACT, class V>
INLINE V slope_(int act, V v, float alpha) {
    if constexpr (ACT == SMOOTH) return smooth_slope(act, v);
    else return slope<ACT>(v, alpha);
}

struct Shape {  // of the activation
    int act;
    float alpha, gain, limit, sign;
    Shape(const BiasAct &a, float none)
        : act(a.act), alpha(a.alpha), gain(a.gain), limit(a.clamp < 0 ? none : a.clamp), sign(a.gain < 0 ? -1 : 1) {}
};

// A factor that goes along with the elements of a run (STEP 1), or is the same for all of them (STEP 0).
template <class V, int STEP>
INLINE V factor(const float *p, int64_t i) {
    if constexpr (STEP) return load<V>(p + i);
    else return V{} + *p;
}

// Copies of the factors that are the same for a whole run, in place of the pointers to them: the run's results might
// overwrite those, for all that the compiler knows, which would read them again for every element.
struct Same {
    float scale = 0, bias = 0, noise = 0;
    INLINE Same(int factor_step, const float *&scale_at, const float *&bias_at, const float *&noise_at) {
        if (factor_step) {
            noise = *noise_at, noise_at = &noise;
        } else {
            scale = *scale_at, scale_at = &scale;
            bias = *bias_at, bias_at = &bias;
        }
    }
};

// Runs of elements next to each other: along the channels of a pixel (FACTOR_STEP 1: scale and bias differ, the noise is
// the same) or along the pixels of a channel (0).
template <class V, class T, int ACT, int FACTOR_STEP>
INLINE V argument(const T *x, int64_t i, const float *scale, const float *bias, const float *noise) {
    return load<V>(x + i) * factor<V, FACTOR_STEP>(scale, i) +
           (factor<V, FACTOR_STEP>(bias, i) + factor<V, 1 - FACTOR_STEP>(noise, i));
}

template <class T, int ACT, int FACTOR_STEP>
INLINE void forward_run(const T *x, T *y, int64_t count, const float *scale, const float *bias, const float *noise,
                        const Shape s) {
    const Same same(FACTOR_STEP, scale, bias, noise);
    auto some = [&](auto kind, int64_t i) __attribute__((always_inline)) {
        typedef decltype(kind) V;
        const V v = argument<V, T, ACT, FACTOR_STEP>(x, i, scale, bias, noise);
        store<V>(y + i, clamped(activate_<ACT>(s.act, v, s.alpha) * s.gain, s.limit));
    };
    int64_t i = 0;
    if constexpr (ACT != SMOOTH)
        for (; i + LANES <= count; i += LANES) some(vec{}, i);
    for (; i < count; i++) some(0.0f, i);
}

template <class T, int ACT>
void forward(const BiasAct &a, int threads) {
    const Units units(a);
    const Shape shape(a, INFINITY);
    Buffer ones(a.c, 1.0f), zeros(std::max(a.c, units.pixels), 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < units.count; i++) {
        const Unit u(a, units, i, ones.data, zeros.data);
        if (a.channels_last)
            for (int64_t p = 0; p < u.pixels; p++) {
                const int64_t at = (u.n * a.p + u.first + p) * a.c;
                forward_run<T, ACT, 1>((const T *)a.x + at, (T *)a.out + at, a.c, u.scale, u.bias, u.noise + p, shape);
            }
        else
            for (int64_t c = 0; c < a.c; c++) {
                const int64_t at = (u.n * a.c + c) * a.p + u.first;
                forward_run<T, ACT, 0>((const T *)a.x + at, (T *)a.out + at, u.pixels, u.scale + c, u.bias + c, u.noise,
                                       shape);
            }
    }
}

enum { NO_SUMS, SUMS_OF_G, ALL_SUMS };

// Sums along a run, of g and of g * x.
struct Sums {
    vec g{}, gx{};
    float rest_g = 0, rest_gx = 0;
    INLINE void add(vec of_g, vec of_gx) { g += of_g, gx += of_gx; }
    INLINE void add(float of_g, float of_gx) { rest_g += of_g, rest_gx += of_gx; }
};

INLINE float total(vec lanes, float rest) {
    for (int i = 0; i < LANES; i++) rest += lanes[i];
    return rest;
}

// As forward_run. Sums that run across go to the elements' own places: over pixels at each channel to g_at and gx_at
// (FACTOR_STEP 1), over channels at each pixel to g_at alone.
template <class T, int ACT, int FACTOR_STEP, int SUMS>
INLINE void backward_run(const T *x, const T *y, const T *dy, T *dx, int64_t count, const float *scale,
                         const float *bias, const float *noise, float *g_at, float *gx_at, Sums &along, const Shape s) {
    const Same same(FACTOR_STEP, scale, bias, noise);
    auto some = [&](auto kind, int64_t i) __attribute__((always_inline)) {
        typedef decltype(kind) V;
        V result = load<V>(y + i), sign = result * s.sign;
        if constexpr (ACT == SMOOTH) {
            sign = argument<V, T, ACT, FACTOR_STEP>(x, i, scale, bias, noise);
            result = activate_<ACT>(s.act, sign, s.alpha) * s.gain;
        }
        const V inside = magnitude(result) >= V{} + s.limit ? V{} : V{} + s.gain;
        const V g = load<V>(dy + i) * (inside * slope_<ACT>(s.act, sign, s.alpha));
        store<V>(dx + i, g * factor<V, FACTOR_STEP>(scale, i));
        if constexpr (SUMS != NO_SUMS) {
            V gx{};
            if constexpr (SUMS == ALL_SUMS) gx = g * load<V>(x + i);
            if constexpr (SUMS == ALL_SUMS && FACTOR_STEP) store<V>(gx_at + i, load<V>(gx_at + i) + gx);
            store<V>(g_at + i, load<V>(g_at + i) + g);
            along.add(g, gx);
        }
    };
    int64_t i = 0;
    if constexpr (ACT != SMOOTH)
        for (; i + LANES <= count; i += LANES) some(vec{}, i);
    for (; i < count; i++) some(0.0f, i);
}

// `sums`: for each unit [2, c], of g and of g * x. `noise_sums` [n, p], of g.
template <class T, int ACT, int SUMS>
void backward_units(const BiasAct &a, const Units &units, float *sums, float *noise_sums, int threads) {
    Shape shape(a, NAN);  // without a clamp, nothing is beyond it: not infinity either
    if (ACT != SMOOTH) shape.limit = to_float(from_float<T>(shape.limit));  // as results at the limit were rounded
    const T *y = (const T *)(a.y ? a.y : a.dy), *x = (const T *)(a.x ? a.x : a.dy), *dy = (const T *)a.dy;
    const int64_t run = std::max(a.c, units.pixels);
    Buffer ones(a.c, 1.0f), zeros(run, 0.0f), spare(run * threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t i = units.count * part / threads; i < units.count * (part + 1) / threads; i++) {
            const Unit u(a, units, i, ones.data, zeros.data);
            float *bias_at = SUMS ? sums + i * 2 * a.c : nullptr, *scale_at = bias_at + a.c;
            float *noise_at = SUMS ? noise_sums + u.n * a.p + u.first : nullptr;
            if (SUMS) {
                std::fill(bias_at, bias_at + 2 * a.c, 0.0f);
                std::fill(noise_at, noise_at + u.pixels, 0.0f);
            }
            const int64_t runs = a.channels_last ? u.pixels : a.c;
            for (int64_t r = 0; r < runs; r++) {
                Sums along;
                const int64_t at = a.channels_last ? (u.n * a.p + u.first + r) * a.c : (u.n * a.c + r) * a.p + u.first;
                T *dx = a.out ? (T *)a.out + at : (T *)(spare.data + part * run);
                if (a.channels_last) {
                    backward_run<T, ACT, 1, SUMS>(x + at, y + at, dy + at, dx, a.c, u.scale, u.bias, u.noise + r,
                                                  bias_at, scale_at, along, shape);
                    if (SUMS) noise_at[r] = total(along.g, along.rest_g);
                } else {
                    backward_run<T, ACT, 0, SUMS>(x + at, y + at, dy + at, dx, u.pixels, u.scale + r, u.bias + r,
                                                  u.noise, noise_at, nullptr, along, shape);
                    if (SUMS) bias_at[r] = total(along.g, along.rest_g), scale_at[r] = total(along.gx, along.rest_gx);
                }
            }
        }
}

// out[j] = the sum over i < rows of in[i * step + j]
INLINE void sum_rows(const float *in, int64_t rows, int64_t step, int64_t count, float *out) {
    std::fill(out, out + count, 0.0f);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < count; j++) out[j] += in[i * step + j];
}

template <class T, int ACT>
void backward(const BiasAct &a, int threads) {
    const Units units(a);
    if (!a.dscale && !a.dnoise && !a.dbias) return backward_units<T, ACT, NO_SUMS>(a, units, nullptr, nullptr, threads);
    Buffer sums(units.count * 2 * a.c), noise_sums(a.dnoise && a.noise_batch ? 0 : a.n * a.p);
    float *noise_at = a.dnoise && a.noise_batch ? a.dnoise : noise_sums.data;
    if (a.dscale) backward_units<T, ACT, ALL_SUMS>(a, units, sums.data, noise_at, threads);
    else backward_units<T, ACT, SUMS_OF_G>(a, units, sums.data, noise_at, threads);
    if (a.dscale)
        for (int64_t n = 0; n < a.n; n++)
            sum_rows(sums.data + n * units.per_image * 2 * a.c + a.c, units.per_image, 2 * a.c, a.c, a.dscale + n * a.c);
    if (a.dbias) sum_rows(sums.data, units.count, 2 * a.c, a.c, a.dbias);
    if (a.dnoise && !a.noise_batch) sum_rows(noise_sums.data, a.n, a.p, a.p, a.dnoise);
}

template <class T>
void dispatch(const BiasAct &a, bool forwards, int threads) {
    switch (a.act) {
        case LINEAR: return forwards ? forward<T, LINEAR>(a, threads) : backward<T, LINEAR>(a, threads);
        case RELU: return forwards ? forward<T, RELU>(a, threads) : backward<T, RELU>(a, threads);
        case LRELU: return forwards ? forward<T, LRELU>(a, threads) : backward<T, LRELU>(a, threads);
        default: return forwards ? forward<T, SMOOTH>(a, threads) : backward<T, SMOOTH>(a, threads);
    }
}

int dispatch(const BiasAct &a, bool forwards, int threads) {
    return guarded([&] {
        if (a.dtype == F32) return dispatch<float>(a, forwards, threads);
        if (a.dtype == BF16) return dispatch<bf16>(a, forwards, threads);
        return dispatch<fp16>(a, forwards, threads);
    });
}

}  // namespace

extern "C" int sl_bias_act_forward(const BiasAct *a, int threads, void *) {
    return a->n && a->c && a->p ? dispatch(*a, true, threads) : 0;
}

extern "C" int64_t sl_bias_act_workspace(const BiasAct *) { return 0; }

// The sums of an empty tensor are left to the caller.
extern "C" int sl_bias_act_backward(const BiasAct *a, void *, int threads, void *) {
    return a->n && a->c && a->p ? dispatch(*a, false, threads) : 0;
}

extern "C" const char *sl_error(int code) { return code == OUT_OF_MEMORY ? "out of memory" : "no error"; }
