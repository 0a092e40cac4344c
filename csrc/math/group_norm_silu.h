// Group normalisation followed by SiLU, and its gradient. The definition is in
// python/pumice/ops/group_norm_silu.py.
#pragma once

#include <math.h>
#include <string.h>

#include "math/common.h"

namespace pumice {

// x, y, dy, dx are (batch, channels, size) or, channels_last, (batch, size, channels), dense.
struct GroupNormSilu {
    const void* x;
    const void* weight;
    const void* bias;
    float* mean;  // (batch, groups)
    float* rstd;
    Dtype dtype, weight_dtype, bias_dtype;
    int64_t batch, channels, size, groups;
    int channels_last;

    PUMICE_MEMBER int64_t per_group() const { return channels / groups; }
};

struct Moments {
    float count, mean, m2;  // m2: the sum of squared distances from the mean
};

PUMICE_INLINE Moments merge(Moments a, Moments b) {  // Chan, Golub, LeVeque, 1979
    const float count = a.count + b.count;
    if (count == 0) return a;
    const float delta = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

PUMICE_INLINE float exp_negative(float z) {  // exp(-z)
#if defined(__CUDA_ARCH__)
    return exp2f(-1.44269504f * z);
#else
    // Cephes' polynomial, in operations that vectorise: adding 1.5 * 2^23 rounds to an integer and leaves it
    // in the lowest bits, from where a shift moves it into the exponent.
    const float x = clamp(-z, -87.0f, 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float mantissa = (p * r * r + r) + 1.0f;
    uint32_t power, bits;
    memcpy(&power, &shifted, sizeof power);
    memcpy(&bits, &mantissa, sizeof bits);
    bits += power << 23;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

PUMICE_INLINE float sigmoid(float z) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, 1.0f + exp_negative(z));
#else
    return 1.0f / (1.0f + exp_negative(z));
#endif
}

PUMICE_INLINE float silu(float z) { return z * sigmoid(z); }

PUMICE_INLINE float silu_slope(float z) {
    const float s = sigmoid(z);
    return s + z * s * (1.0f - s);
}

// Of one element: the normalised value, and the gradient before the affine map.
struct GroupNormGrad {
    float normal, dz;
};

PUMICE_INLINE GroupNormGrad group_norm_grad(float x, float dy, float mean, float rstd, float weight,
                                            float bias) {
    const float normal = (x - mean) * rstd;
    return {normal, dy * silu_slope(normal * weight + bias)};
}

// mean_dz and mean_dzn: means over the group of weight * dz and weight * dz * normal.
PUMICE_INLINE float group_norm_dx(GroupNormGrad g, float rstd, float weight, float mean_dz, float mean_dzn) {
    return rstd * (weight * g.dz - mean_dz - g.normal * mean_dzn);
}

}  // namespace pumice
