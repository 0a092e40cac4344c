// How far a prompt moves a prediction: sums over a sample of d = cond - uncond and u = uncond.
// The definition is `reference` in python/pumice/ops/guidance_magnitude.py.
#pragma once

#include <math.h>

#include "math/common.h"

namespace pumice {

// Of one position, over its channels.
struct PositionSums {
    float dd, uu, du;
};

PUMICE_INLINE float guidance_cosine(PositionSums s) {  // as torch.cosine_similarity
    const float d = sqrtf(s.dd), u = sqrtf(s.uu);
    return s.du / ((d < 1e-8f ? 1e-8f : d) * (u < 1e-8f ? 1e-8f : u));
}

// Of a sample: dd, uu, du, and the sum of the positions' cosines, in this order.
constexpr int kGuidanceSums = 4;

}  // namespace pumice
