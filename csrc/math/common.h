// What g++ and nvcc both need to share one formula.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define PUMICE_INLINE static __host__ __device__ __forceinline__
#define PUMICE_MEMBER __host__ __device__ __forceinline__
#else
// Always inlined: the instruction level of the caller is then the level of the formula (see cpu/isa.h).
#define PUMICE_INLINE static inline __attribute__((always_inline, unused))
#define PUMICE_MEMBER inline __attribute__((always_inline))
#endif

namespace pumice {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// Comparisons, not fmin and fmax: a NaN value stays NaN, as in torch.clamp.
PUMICE_INLINE float clamp(float value, float lower, float upper) {
    value = value < lower ? lower : value;
    return value > upper ? upper : value;
}

}  // namespace pumice
