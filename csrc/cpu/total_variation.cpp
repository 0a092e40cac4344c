#include "cpu/total_variation.h"

#include <string.h>

namespace pumice {
namespace PUMICE_ISA {
namespace {

// One row of one iteration, in place. It reads what the row below has not written yet, and what the row
// above has written: a single sweep downwards is a whole iteration.
template <bool Isotropic>
inline void sweep_row(const TotalVariation& a, float* state, int64_t plane, int64_t row, TvStep step) {
    const int64_t width = a.width, size = a.height * width, at = row * width;
    const bool last = row == a.height - 1;
    const float* f = a.images + plane * size + at;
    float* x = a.out + plane * size + at;
    float* ahead = state + plane * 3 * size + at;
    float* right = ahead + size;
    float* down = right + size;
    const float* below = last ? ahead : ahead + width;  // no step down from the last row
    const float weight = a.weights ? a.weights[plane / a.channels] : a.weight;

#pragma omp simd
    for (int64_t i = 0; i < width - 1; ++i) {
        float r = right[i] + step.sigma * (ahead[i + 1] - ahead[i]);
        float d = down[i] + step.sigma * (below[i] - ahead[i]);
        tv_project(r, d, weight, Isotropic);
        right[i] = r;
        down[i] = d;
    }
    const int64_t end = width - 1;
    float none = 0, d = down[end] + step.sigma * (below[end] - ahead[end]);
    tv_project(none, d, weight, Isotropic);
    down[end] = d;

    const float* above = down - width;
    if (row == 0) {
        tv_descend(x[0], ahead[0], f[0] + right[0] + down[0], step);
#pragma omp simd
        for (int64_t i = 1; i < width; ++i)
            tv_descend(x[i], ahead[i], f[i] + (right[i] - right[i - 1]) + down[i], step);
    } else {
        tv_descend(x[0], ahead[0], f[0] + right[0] + (down[0] - above[0]), step);
#pragma omp simd
        for (int64_t i = 1; i < width; ++i)
            tv_descend(x[i], ahead[i], f[i] + (right[i] - right[i - 1]) + (down[i] - above[i]), step);
    }
}

}  // namespace

void total_variation_begin(const TotalVariation& a, float* state, int64_t plane) {
    const int64_t size = a.height * a.width;
    const size_t bytes = static_cast<size_t>(size) * sizeof(float);
    memcpy(a.out + plane * size, a.images + plane * size, bytes);
    memcpy(state + plane * 3 * size, a.images + plane * size, bytes);
    memset(state + (plane * 3 + 1) * size, 0, 2 * bytes);
}

void total_variation_sweep(const TotalVariation& a, float* state, int64_t plane, const TvStep* steps,
                           int count) {
    for (int64_t first = 0; first < a.height + count - 1; ++first)
        for (int k = 0; k < count; ++k) {
            const int64_t row = first - k;
            if (row < 0 || row >= a.height) continue;
            if (a.isotropic)
                sweep_row<true>(a, state, plane, row, steps[k]);
            else
                sweep_row<false>(a, state, plane, row, steps[k]);
        }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
