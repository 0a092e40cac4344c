#include "cpu/pgd_step.h"

#include "cpu/tile.h"

namespace pumice {
namespace PUMICE_ISA {

namespace {
bool streams(const PgdStep& a) {
    const int64_t cache = 1 << 21;  // elements
    return a.out != a.x && a.batch * a.size > cache;
}
}  // namespace

void pgd_step_linf(const PgdStep& a, int64_t sample, int64_t begin, int64_t end) {
    const float step = a.steps ? a.steps[sample] : a.step;
    const float eps = a.eps, lower = a.lower, upper = a.upper;
    const bool stream = streams(a);
    float buffer[kTile], result[kTile];
    for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = end - i < kTile ? end - i : kTile;
        const float* grad = load_run(a.grad, a.grad_dtype, sample * a.grad_stride + i, n, buffer);
        const float* x = a.x + sample * a.x_stride + i;
        const float* x0 = a.x0 + sample * a.x0_stride + i;
        float* to = a.out + sample * a.out_stride + i;  // may be x itself
        float* out = stream ? result : to;
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) out[k] = pgd_linf(x[k], grad[k], x0[k], step, eps, lower, upper);
        if (stream) stream_run(to, result, n);
    }
    if (stream) stream_end();
}

void pgd_step_sums(const PgdStep& a, int64_t sample, int64_t begin, int64_t end, PgdSums* sums) {
    float buffer[kTile];
    PgdSums total = {0, 0, 0};
    for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = end - i < kTile ? end - i : kTile;
        const float* grad = load_run(a.grad, a.grad_dtype, sample * a.grad_stride + i, n, buffer);
        const float* x = a.x + sample * a.x_stride + i;
        const float* x0 = a.x0 + sample * a.x0_stride + i;
        float gg = 0, dg = 0, dd = 0;
#pragma omp simd reduction(+ : gg, dg, dd)
        for (int64_t k = 0; k < n; ++k) {
            const float delta = x[k] - x0[k];
            gg += grad[k] * grad[k];
            dg += delta * grad[k];
            dd += delta * delta;
        }
        total.gg += gg;
        total.dg += dg;
        total.dd += dd;
    }
    *sums = total;
}

void pgd_step_l2(const PgdStep& a, int64_t sample, int64_t begin, int64_t end, PgdScales scales) {
    const float lower = a.lower, upper = a.upper;
    const bool stream = streams(a);
    float buffer[kTile], result[kTile];
    for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = end - i < kTile ? end - i : kTile;
        const float* grad = load_run(a.grad, a.grad_dtype, sample * a.grad_stride + i, n, buffer);
        const float* x = a.x + sample * a.x_stride + i;
        const float* x0 = a.x0 + sample * a.x0_stride + i;
        float* to = a.out + sample * a.out_stride + i;
        float* out = stream ? result : to;
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) out[k] = pgd_l2(x[k], grad[k], x0[k], scales, lower, upper);
        if (stream) stream_run(to, result, n);
    }
    if (stream) stream_end();
}

}  // namespace PUMICE_ISA
}  // namespace pumice
