// W <- W + (W D) B for many matrices W at once. The definition is `reference` in
// python/pumice/ops/low_rank_edit.py.
#pragma once

#include "math/common.h"

namespace pumice {

// Dense rows, `stride` elements from one to the next.
struct LowRankMatrix {
    void* data;
    int64_t rows, stride;
};

// What all matrices of a call share.
struct LowRankEdit {
    Dtype dtype;
    int64_t columns, rank;
    const float* up;    // D transposed, (rank, columns): a dot product then walks along a row of it
    const float* down;  // B, (rank, columns)
};

// Both steps for a tile of rows; V is a float, or a vector of them from neighbouring columns. First u = W D,
template <int ROWS, int RANKS, class V>
PUMICE_INLINE void low_rank_project(const V (&w)[ROWS], const V (&up)[RANKS], V (&u)[ROWS][RANKS]) {
    for (int i = 0; i < ROWS; ++i)
        for (int k = 0; k < RANKS; ++k) u[i][k] += w[i] * up[k];
}

// then, over all ranks, u B: apart from W, so that adding it there rounds once.
template <int ROWS, class V>
PUMICE_INLINE void low_rank_expand(const float* u, V down, V (&delta)[ROWS]) {
    for (int i = 0; i < ROWS; ++i) delta[i] += u[i] * down;
}

}  // namespace pumice
