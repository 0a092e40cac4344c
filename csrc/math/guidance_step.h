// Classifier-free guidance, the prediction of x0, and a linear sampler's update.
// The definition is `reference` in python/pumice/ops/guidance_step.py.
#pragma once

#include "math/guidance_magnitude.h"

namespace pumice {

enum class Prediction : int { epsilon = 0, v = 1, flow = 2 };

// The columns of `coefficients`.
struct StepCoefficients {
    float alpha, sigma;       // x = alpha x0 + sigma eps
    float x0, eps, x, noise;  // the new sample as a sum of these
};

// Every prediction type is linear: x0 = x0_x x + x0_out out, eps = eps_x x + eps_out out.
struct PredictionMap {
    float x0_x, x0_out, eps_x, eps_out;
};

PUMICE_INLINE PredictionMap prediction_map(Prediction type, float alpha, float sigma) {
    switch (type) {
        case Prediction::v:
            return {alpha, -sigma, sigma, alpha};
        case Prediction::flow:
            return {1.0f, -sigma, 1.0f, alpha};
        default:
            return {1.0f / alpha, -sigma / alpha, 0.0f, 1.0f};
    }
}

// clip: the largest |x0|; infinity for none.
PUMICE_INLINE float guidance_step(float x, float cond, float uncond, float noise, float scale,
                                  PredictionMap map, StepCoefficients c, float clip) {
    const float out = uncond + scale * (cond - uncond);
    const float x0 = clamp(map.x0_x * x + map.x0_out * out, -clip, clip);
    const float eps = map.eps_x * x + map.eps_out * out;
    return c.x0 * x0 + c.eps * eps + c.x * x + c.noise * noise;
}

// A batch of dense samples, each (channels, positions) or, channels_last, (positions, channels). A stride of
// 0 lets one sample, or one row of coefficients, serve the whole batch. Without `out` only the sums are
// computed.
struct GuidanceStep {
    void* out;
    const void* x;
    const void* cond;
    const void* uncond;
    const void* noise;         // or null: none
    Dtype dtype, model_dtype;  // of out, x and noise; of cond and uncond
    int64_t batch, channels, positions;
    int channels_last;
    int64_t out_stride, x_stride, cond_stride, uncond_stride, noise_stride;
    float scale;
    const float* scales;  // one a sample, or null: then `scale` is everybody's
    const float* coefficients;
    int64_t coefficients_stride;
    Prediction prediction;
    float clip;
};

PUMICE_INLINE StepCoefficients step_coefficients(const GuidanceStep& a, int64_t sample) {
    const float* c = a.coefficients + sample * a.coefficients_stride;
    return {c[0], c[1], c[2], c[3], c[4], c[5]};
}

}  // namespace pumice
