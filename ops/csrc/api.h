// What Python calls, the same in the CPU and in the CUDA library. Plain C types only, so that neither library needs
// torch's headers: they build in seconds and do not depend on torch's version. All functions return 0, or an error
// that `sl_error` puts into words.
#pragma once
#include <stdint.h>

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum Activation { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

// y [n, c, oh, ow] = upfirdn2d of x [n, c, h, w]; both dense, of one dtype, in one layout.
// Separable filters: fx [fw], fy [fh]. Otherwise fx [fh, fw] and fy null. Filters are float32 on the tensors' device.
struct Upfirdn2d {
    const void *x;
    void *y;
    const float *fx, *fy;
    int64_t n, c, h, w, oh, ow;
    int32_t dtype, channels_last;
    int32_t fw, fh, up_x, up_y, down_x, down_y;
    int32_t pad_x, pad_y;  // before the first sample; negative crops
    int32_t flip;          // correlate instead of convolve
    float gain;
};

// Forward: y = clamp(gain * act(x * scale[n, c] + noise[n or 0, p] + bias[c])), x and y [n, c, p] (p pixels), dense, in
// one layout and dtype; scale, noise, bias float32 or null.
// Backward, from dy: dx, and the sums dscale [n, c] (over p, of g * x), dnoise (over c, and over n where the noise has
// no batch), dbias [c] (over n and p), each float32 or null when not wanted; g is the gradient before scale.
// y must be given where the activation is piecewise linear (its sign tells the slope), x where it is not (with scale,
// noise and bias, to compute the argument again) and wherever dscale is wanted.
struct BiasAct {
    const void *x, *y, *dy;
    void *out;  // forward: y; backward: dx, or null
    const float *scale, *noise, *bias;
    float *dscale, *dnoise, *dbias;
    int64_t n, c, p;
    int32_t dtype, channels_last;
    int32_t noise_batch;  // 1: noise [n, p]; 0: noise [p]
    int32_t act;
    float alpha, gain, clamp;  // clamp < 0: none
};

// A 3x3 convolution of x [n, h, w, ci] to y [n, oh, ow, co], float32, with weights of `co_stride` and `ci_stride`
// elements and 9 adjacent taps, mirrored with `flip`. Channel counts are multiples of `sl_winograd_lanes()`.
// SAME: stride 1, padding 1. DOWN: stride 2, no padding, h = 2 oh + 1. UP: the transpose of DOWN, oh = 2 h + 1.
// `sl_winograd` writes y; `sl_winograd_weight` writes the weights' gradient, y being the gradient of the result (not UP).
enum WinogradKind { SAME, DOWN, UP };
struct Winograd {
    const float *x;
    float *weight, *y;
    int64_t n, h, w, oh, ow, ci, co;
    int64_t co_stride, ci_stride;
    int32_t kind, flip;
};

#ifdef __cplusplus
extern "C" {
#endif
// `stream` is a cudaStream_t of the device `device` in the CUDA library; the CPU library takes the number of threads in
// `device` and ignores `stream`.
int sl_upfirdn2d(const struct Upfirdn2d *args, int device, void *stream);
int sl_bias_act_forward(const struct BiasAct *args, int device, void *stream);
// `workspace` holds `sl_bias_act_workspace(args)` bytes on the device, uninitialised.
int64_t sl_bias_act_workspace(const struct BiasAct *args);
int sl_bias_act_backward(const struct BiasAct *args, void *workspace, int device, void *stream);
const char *sl_error(int code);
// CUDA library only: the error, if any, that this library's kernels meet on this device with this driver.
int sl_check(int device);

// CPU library only.
int sl_winograd_lanes();
int sl_winograd(const struct Winograd *args, int threads);
int sl_winograd_weight(const struct Winograd *args, int threads);
#ifdef __cplusplus
}
#endif
