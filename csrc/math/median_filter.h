// The median of a square window. The definition is `reference` in python/pumice/ops/median_filter.py.
#pragma once

#include "math/common.h"
#include "math/unroll.h"

namespace pumice {

constexpr int kMedianSizes = 15;  // the largest window

// `planes` pictures of one channel, dense.
struct MedianFilter {
    void* out;
    const void* x;
    Dtype dtype;
    int64_t planes, height, width;
    int size;
};

// Where position i of a row of n comes from: the edges are repeated.
PUMICE_INLINE int64_t within(int64_t i, int64_t n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

// A float's bits as an integer that sorts as the float does, and back. Medians are elements: they need no
// arithmetic, so every storage type is sorted as integers of its own width.
template <class Int>
PUMICE_INLINE Int median_key(Int bits) {
    constexpr Int magnitude = static_cast<Int>((Int(1) << (8 * sizeof(Int) - 2)) - 1) * 2 + 1;
    return static_cast<Int>(bits ^ ((bits >> (8 * sizeof(Int) - 1)) & magnitude));
}

// The key of infinity: NaN lies above it, or below its complement, which is the key of minus infinity.
PUMICE_INLINE int32_t median_infinity(Dtype dtype) {
    return dtype == Dtype::f32 ? 0x7f800000 : dtype == Dtype::f16 ? 0x7c00 : 0x7f80;
}

PUMICE_INLINE bool median_is_nan(int32_t key, int32_t infinity) { return key > infinity || key < ~infinity; }

// The quiet NaN: with the highest bit of the mantissa.
PUMICE_INLINE int32_t median_nan(int32_t infinity) { return infinity | (infinity & -infinity) >> 1; }

// The networks below hold their values in an array V[]: V is an integer, or a vector of them that holds as
// many pixels. They consist of minima and maxima alone.
template <class V>
PUMICE_INLINE void order(V& low, V& high) {
    const V a = low, b = high;
    low = a < b ? a : b;
    high = a < b ? b : a;
}

PUMICE_INLINE constexpr int half_of(int n) {  // the largest power of two below n
    int half = 1;
    while (2 * half < n) half *= 2;
    return half;
}

// Sorts v[0..N) that rises and then falls into falling order, or that falls and then rises into rising order
// (Batcher, 1968); only places LOW to HIGH - 1 of the result are needed, and what does not lead there is left
// out. An N that is no power of two stands for the next one, filled up with values that never move.
template <int N, bool RISING, int LOW, int HIGH, class V>
PUMICE_MEMBER void merge(V* v) {
    if constexpr (N > 1 && LOW < HIGH) {
        constexpr int half = half_of(N);
        PUMICE_UNROLL
        for (int i = 0; i < N - half; ++i) {
            if constexpr (RISING)
                order(v[i], v[i + half]);
            else
                order(v[i + half], v[i]);
        }
        merge<half, RISING, LOW, (HIGH < half ? HIGH : half)>(v);
        merge<N - half, RISING, (LOW > half ? LOW - half : 0), HIGH - half>(v + half);
    }
}

template <int N, bool RISING, class V>
PUMICE_MEMBER void sort(V* v) {
    if constexpr (N > 1) {
        constexpr int first = N / 2;
        sort<first, !RISING>(v);
        sort<N - first, RISING>(v + first);
        merge<N, RISING, 0, N>(v);
    }
}

// Two windows of SIZE rows, one above the other, share SIZE - 1 rows. Of these, in order, only places
// kLow to kLow + SIZE can be the median of either window, whatever the remaining row holds.
template <int SIZE>
struct MedianShare {
    static constexpr int kRows = SIZE - 1;
    static constexpr int kLow = (SIZE * SIZE - 2 * SIZE - 1) / 2;
    static constexpr int kCount = SIZE + 1;
};

// The median of the SIZE + 1 values that can be it, and the SIZE of the remaining row; both rise.
template <int SIZE, class V>
PUMICE_MEMBER V median_of(const V* shared, const V* row) {
    V median = shared[SIZE];
    PUMICE_UNROLL
    for (int i = 0; i < SIZE; ++i) {
        const V a = shared[i], b = row[SIZE - 1 - i];
        const V larger = a < b ? b : a;
        median = median < larger ? median : larger;
    }
    return median;
}

// The median of keys, for windows too large for a network in registers: the smallest bound that more than
// half of them do not exceed. rows(i, j) is the key at row i and column j.
template <class Window>
PUMICE_INLINE int32_t median_bisect(const Window& rows, int size, int32_t infinity) {
    int32_t low = rows(0, 0), high = low;
    for (int i = 0; i < size; ++i)
        for (int j = 0; j < size; ++j) {
            const int32_t key = rows(i, j);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
    if (median_is_nan(low, infinity) || median_is_nan(high, infinity)) return median_nan(infinity);
    while (low < high) {
        const uint32_t half = (static_cast<uint32_t>(high) - static_cast<uint32_t>(low)) / 2;
        const int32_t middle = static_cast<int32_t>(static_cast<uint32_t>(low) + half);
        int count = 0;
        for (int i = 0; i < size; ++i)
            for (int j = 0; j < size; ++j) count += rows(i, j) <= middle;
        if (2 * count > size * size)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

}  // namespace pumice
