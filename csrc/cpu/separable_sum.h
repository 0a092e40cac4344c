// Weighted sums down the rows and across the columns of planes. The definition is `reference` in
// python/pumice/ops/separable_sum.py.
#pragma once

#include "cpu/isa.h"

namespace pumice {

struct Run;

// `count` sums of `terms` elements each along one side: places, which are whole numbers, and weights.
struct Taps {
    const float* table;  // (count, 2, terms)
    int64_t count, terms;

    PUMICE_MEMBER const float* places(int64_t i) const { return table + 2 * i * terms; }
    PUMICE_MEMBER const float* weights(int64_t i) const { return places(i) + terms; }
};

// Dense planes: `rows` and `columns` say how many of each there are in `out`.
struct SeparableSum {
    float* out;
    const float* images;
    int64_t planes, height, width;
    Taps rows, columns;
};

// Rows of one plane that are summed together, at most.
constexpr int kSumRows = 64;

// strip: their sums down the rows, (width, kSumRows).
PUMICE_EACH_ISA(void separable_sum_rows(const SeparableSum& a, int64_t plane, int64_t begin, int64_t end,
                                        float* strip);)

inline int64_t separable_sum_workspace(int64_t width, int threads) { return threads * width * kSumRows; }
void separable_sum(const SeparableSum& a, float* workspace, Run run);

}  // namespace pumice
