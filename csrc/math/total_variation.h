// Total variation denoising. The definition is `reference` in python/pumice/ops/total_variation.py.
#pragma once

#include <math.h>

#include "math/common.h"

namespace pumice {

// Planes (samples * channels, height, width), dense, float32.
struct TotalVariation {
    float* out;
    const float* images;
    int64_t samples, channels, height, width;
    float weight;
    const float* weights;  // one a sample, or null: then `weight` is everybody's
    int iterations;
    int isotropic;
};

// What an iteration does it with: the accelerated algorithm of Chambolle and Pock changes its steps.
struct TvStep {
    float sigma;     // of the dual
    float pull;      // tau / (1 + tau): of the primal towards its target
    float momentum;  // theta
};

struct TvSteps {
    double tau = 0.35355339059327379;  // 1 / sqrt(8), and so is sigma: tau sigma |grad|^2 = 1

    TvStep next() {
        const double sigma = 1 / (8 * tau), pull = tau / (1 + tau);
        const double momentum = 1 / sqrt(1 + 2 * 0.4 * tau);
        tau *= momentum;
        return {static_cast<float>(sigma), static_cast<float>(pull), static_cast<float>(momentum)};
    }
};

// One pixel's dual variables, after the ascent, back into the ball of radius `weight`.
PUMICE_INLINE void tv_project(float& right, float& down, float weight, bool isotropic) {
    if (isotropic) {
        const float norm = sqrtf(right * right + down * down);
        const float scale = norm > weight ? weight / norm : 1.0f;
        right *= scale;
        down *= scale;
    } else {
        right = clamp(right, -weight, weight);
        down = clamp(down, -weight, weight);
    }
}

// x and what the next dual step looks at, from the target f + div(dual).
PUMICE_INLINE void tv_descend(float& x, float& ahead, float target, TvStep step) {
    const float before = x;
    x = before + step.pull * (target - before);  // exact where x is at its target
    ahead = x + step.momentum * (x - before);
}

}  // namespace pumice
