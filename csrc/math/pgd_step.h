// One projected gradient step. The definition is `reference` in python/pumice/ops/pgd_step.py.
#pragma once

#include <math.h>

#include "math/common.h"

namespace pumice {

// A batch of dense samples: sample i of a tensor starts i * <tensor>_stride elements after its pointer.
struct PgdStep {
    float* out;
    const float* x;
    const void* grad;
    const float* x0;
    Dtype grad_dtype;
    int64_t batch, size;
    int64_t out_stride, x_stride, grad_stride, x0_stride;
    float step;
    const float* steps;  // one a sample, or null: then `step` is everybody's
    float eps, lower, upper;
};

PUMICE_INLINE float pgd_linf(float x, float grad, float x0, float step, float eps, float lower, float upper) {
    float sign = static_cast<float>(grad > 0.0f) - static_cast<float>(grad < 0.0f);  // 0 for 0 and for NaN
    float delta = clamp((x + step * sign) - x0, -eps, eps);
    return clamp(x0 + delta, lower, upper);
}

// One pass over a sample gives these; with delta = x - x0 they hold both norms that the step needs, since
// |delta + a g|^2 = dd + 2 a dg + a^2 gg. Double, because that sum may cancel.
struct PgdSums {
    double gg, dg, dd;
};

struct PgdScales {
    float step;     // on the gradient: step_size / |g|
    float project;  // on the perturbation: min(1, eps / |delta|)
};

PUMICE_INLINE PgdScales pgd_l2_scales(PgdSums sums, float step, float eps) {
    double norm = sqrt(sums.gg);
    double scaled = step / (norm < 1e-12 ? 1e-12 : norm);  // NaN passes through
    double squared = sums.dd + 2 * scaled * sums.dg + scaled * scaled * sums.gg;
    double size = sqrt(squared > 0 ? squared : 0);
    return {static_cast<float>(scaled), size > eps ? static_cast<float>(eps / size) : 1.0f};
}

PUMICE_INLINE float pgd_l2(float x, float grad, float x0, PgdScales scales, float lower, float upper) {
    float delta = (x + scales.step * grad) - x0;
    return clamp(x0 + scales.project * delta, lower, upper);
}

}  // namespace pumice
