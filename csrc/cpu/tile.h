// Half types on the CPU: a kernel works on short runs of float32. A run of float32 storage is used where it
// lies; any other is converted into a buffer that stays in the first-level cache, and rounded once on the way
// back.
#pragma once

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "math/common.h"

namespace pumice {

constexpr int64_t kTile = 1024;

PUMICE_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

PUMICE_INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PUMICE_INLINE float from_bf16(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

PUMICE_INLINE uint16_t to_bf16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

PUMICE_INLINE float from_f16(uint16_t half) {
    uint32_t magnitude = (half & 0x7fffu) << 13;
    // The exponents' biases differ by 112. A multiplication moves them and gets subnormals right.
    uint32_t bits = float_bits(bits_float(magnitude) * 0x1p112f);
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return bits_float(bits | (half & 0x8000u) << 16);
}

PUMICE_INLINE uint16_t to_f16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves exactly the subnormal's bits at the end of the mantissa, rounded by the adder.
    uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// The compiler does not vectorise these to the processor's own conversions, so they are asked for by name.
PUMICE_INLINE void load_f16(const uint16_t* from, int64_t n, float* to) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i,
                         _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
#pragma omp simd
    for (int64_t k = i; k < n; ++k) to[k] = from_f16(from[k]);
}

PUMICE_INLINE void store_f16(const float* from, int64_t n, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + i),
            _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#pragma omp simd
    for (int64_t k = i; k < n; ++k) to[k] = to_f16(from[k]);
}

// The run of n <= kTile elements at `offset`, as float32: in place, or converted into `buffer`.
PUMICE_INLINE const float* load_run(const void* data, Dtype dtype, int64_t offset, int64_t n, float* buffer) {
    if (dtype == Dtype::f32) return static_cast<const float*>(data) + offset;
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    if (dtype == Dtype::f16) {
        load_f16(from, n, buffer);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) buffer[i] = from_bf16(from[i]);
    }
    return buffer;
}

// Where to write a run: the storage itself, or a buffer that store_run then rounds into it.
PUMICE_INLINE float* open_run(void* data, Dtype dtype, int64_t offset, float* buffer) {
    return dtype == Dtype::f32 ? static_cast<float*>(data) + offset : buffer;
}

PUMICE_INLINE void store_run(void* data, Dtype dtype, int64_t offset, int64_t n, const float* buffer) {
    if (dtype == Dtype::f32) return;
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    if (dtype == Dtype::f16) {
        store_f16(buffer, n, to);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(buffer[i]);
    }
}

// Writes past the caches: an output too large to be found there again need not be read in before it is
// overwritten.
PUMICE_INLINE void stream_run(float* to, const float* from, int64_t n) {
#if defined(__SSE2__)
    int64_t i = 0;
    for (; i < n && reinterpret_cast<uintptr_t>(to + i) % 16; ++i) to[i] = from[i];
    for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    for (; i < n; ++i) to[i] = from[i];
#else
    memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
#endif
}

// After the last stream_run of a thread, before others read what it wrote.
PUMICE_INLINE void stream_end() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

PUMICE_INLINE float load_one(const void* data, Dtype dtype, int64_t offset) {
    float buffer[1];
    return *load_run(data, dtype, offset, 1, buffer);
}

}  // namespace pumice
