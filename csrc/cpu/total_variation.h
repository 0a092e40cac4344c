#pragma once

#include "cpu/isa.h"
#include "math/total_variation.h"

namespace pumice {

struct Run;

// Iterations that sweep over a plane together, each a row behind the one before: what they share stays in
// the cache.
constexpr int kTvTogether = 8;

// state: ahead, right and down, three planes for each plane.
PUMICE_EACH_ISA(void total_variation_begin(const TotalVariation& a, float* state, int64_t plane);
                void total_variation_sweep(const TotalVariation& a, float* state, int64_t plane,
                                           const TvStep* steps, int count);)

inline int64_t total_variation_workspace(int64_t samples, int64_t channels, int64_t height, int64_t width) {
    return 3 * samples * channels * height * width;
}
void total_variation(const TotalVariation& a, float* workspace, Run run);

}  // namespace pumice
