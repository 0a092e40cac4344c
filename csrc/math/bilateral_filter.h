// Bilateral filtering over a disc. The definition is `reference` in python/pumice/ops/bilateral_filter.py.
#pragma once

#include <math.h>
#include <string.h>

#include "math/common.h"
#include "math/unroll.h"

namespace pumice {

constexpr int kBilateralSizes = 31;  // the widest disc

// Dense pictures of `channels` channels, 1 to 4.
struct BilateralFilter {
    void* out;
    const void* x;
    Dtype dtype;
    int64_t batch, channels, height, width;
    int size;
    // The weight of a pixel at distance r whose colour differs by d is exp2(space * r^2 + color * d^2).
    float space, color;
};

// Where position i of a row of n comes from: mirrored about the first and the last, which are not repeated.
PUMICE_INLINE int64_t reflected(int64_t i, int64_t n) {
    if (n == 1) return 0;
    const int64_t period = 2 * (n - 1);
    i = (i < 0 ? -i : i) % period;
    return i < n ? i : period - i;
}

// The disc of radius r has the columns -reach to reach in the row dy away from its middle.
PUMICE_INLINE int bilateral_reach(int r, int dy) {
    int reach = r;
    while (reach * reach + dy * dy > r * r) --reach;
    return reach;
}

// exp2(t) for t <= 0; a V is a float or a vector of them, an I an integer or a vector of as many. Far below
// what a float's weight can be seen next to 1, it stays at 2^-126.
template <class I, class V>
PUMICE_INLINE V exp2_falling(V t) {
    const V least = V{} - 126.0f;
    t = t < least ? least : t;  // a NaN stays
    // Adding 1.5 * 2^23 rounds to an integer and leaves it, and the exponent's bias, in the lowest bits.
    const V shifted = t + (12582912.0f + 127.0f);
    const V r = t - (shifted - (12582912.0f + 127.0f));  // -1/2 to 1/2
    V p = r * 1.32647e-3f + 9.67151e-3f;                 // within 2e-7 of the power
    p = p * r + 5.550734e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.93147e-1f;
    p = p * r + 1.0f;
    I bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = bits << 23;
    V power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

template <class I, int CHANNELS, class V>
PUMICE_INLINE V bilateral_weight(const V (&center)[CHANNELS], const V (&other)[CHANNELS], float space,
                                 float color) {
    V distance = V{};
    PUMICE_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
        const V difference = center[c] - other[c];
        distance += difference < 0.0f ? -difference : difference;
    }
    const V t = distance * distance * color + space;
#if defined(__CUDA_ARCH__)
    return exp2f(t);
#else
    return exp2_falling<I>(t);
#endif
}

}  // namespace pumice
