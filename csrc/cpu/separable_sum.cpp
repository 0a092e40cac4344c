#include "cpu/separable_sum.h"

#include "cpu/vector.h"
#include "math/unroll.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

using Floats = Vector<float>;
constexpr int kSide = kLanes<float>;  // of a square block that is transposed in registers
constexpr int kMost = 4;              // blocks side by side

// Elements of two vectors in turn: of their first halves, and of their second.
PUMICE_INLINE void interleave(const Floats& a, const Floats& b, Floats& first, Floats& second) {
#if defined(__AVX512BW__)
    first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Each turn moves the highest bit of an element's row to its column, and the other way round.
inline void transpose(Floats* v) {
    PUMICE_UNROLL
    for (int turn = 1; turn < kSide; turn *= 2) {
        Floats from[kSide];
        PUMICE_UNROLL
        for (int i = 0; i < kSide; ++i) from[i] = v[i];
        PUMICE_UNROLL
        for (int i = 0; i < kSide / 2; ++i) interleave(from[i], from[i + kSide / 2], v[2 * i], v[2 * i + 1]);
    }
}

// Sum i of N vectors side by side, the first of which start `stride` elements apart.
template <int N>
PUMICE_INLINE void sum(const Taps& taps, int64_t i, const float* from, int64_t stride, Floats (*to)[kSide],
                       int row) {
    const float *places = taps.places(i), *weights = taps.weights(i);
    Floats sums[N] = {};
    for (int64_t k = 0; k < taps.terms; ++k) {
        const float* at = from + static_cast<int64_t>(places[k]) * stride;
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) {
            Floats x;
            load<float>(x, at + n * kSide);
            sums[n] += weights[k] * x;
        }
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) to[n][row] = sums[n];
}

PUMICE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// kSide rows from `row` on, of N blocks of columns from x on; columns of the strip become its rows.
template <int N>
inline void down(const SeparableSum& a, const float* plane, int64_t row, int64_t x, float* strip) {
    Floats blocks[N][kSide];
    for (int r = 0; r < kSide; ++r)
        sum<N>(a.rows, least(row + r, a.rows.count - 1), plane + x, a.width, blocks, r);
    for (int n = 0; n < N; ++n) {
        transpose(blocks[n]);
        for (int r = 0; r < kSide; ++r) store<float>(strip + (x + n * kSide + r) * kSumRows, blocks[n][r]);
    }
}

// The same of a plane narrower than a vector.
inline void down_narrow(const SeparableSum& a, const float* plane, int64_t row, float* strip) {
    for (int r = 0; r < kSide; ++r) {
        const int64_t i = least(row + r, a.rows.count - 1);
        const float *places = a.rows.places(i), *weights = a.rows.weights(i);
        for (int64_t x = 0; x < a.width; ++x) {
            float total = 0;
            for (int64_t k = 0; k < a.rows.terms; ++k)
                total += weights[k] * plane[static_cast<int64_t>(places[k]) * a.width + x];
            strip[x * kSumRows + r] = total;
        }
    }
}

// N blocks of rows of the strip, which lie side by side in it, across the columns.
template <int N>
inline void across(const SeparableSum& a, const float* strip, float* out, int64_t rows) {
    const int64_t width = a.columns.count;
    for (int64_t x = 0; x < width; x += kSide) {
        Floats blocks[N][kSide];
        for (int r = 0; r < kSide; ++r)
            sum<N>(a.columns, least(x + r, width - 1), strip, kSumRows, blocks, r);
        const int64_t columns = least(kSide, width - x);
        for (int n = 0; n < N; ++n) {
            transpose(blocks[n]);
            for (int64_t r = 0; r < least(kSide, rows - n * kSide); ++r) {
                float* to = out + (n * kSide + r) * width + x;
                if (columns == kSide)
                    store<float>(to, blocks[n][r]);
                else
                    memcpy(to, &blocks[n][r], static_cast<size_t>(columns) * sizeof(float));
            }
        }
    }
}

}  // namespace

void separable_sum_rows(const SeparableSum& a, int64_t plane, int64_t begin, int64_t end, float* strip) {
    const float* from = a.images + plane * a.height * a.width;
    for (int64_t row = begin; row < end; row += kSide) {
        float* part = strip + (row - begin);
        if (a.width < kSide) {
            down_narrow(a, from, row, part);
            continue;
        }
        int64_t x = 0;
        for (; x + kMost * kSide <= a.width; x += kMost * kSide) down<kMost>(a, from, row, x, part);
        // The last block reaches back into the one before.
        for (; x < a.width; x += kSide) down<1>(a, from, row, least(x, a.width - kSide), part);
    }
    float* out = a.out + (plane * a.rows.count + begin) * a.columns.count;
    for (int64_t row = begin; row < end;) {
        const int64_t left = end - row;
        const float* part = strip + (row - begin);
        float* to = out + (row - begin) * a.columns.count;
        if (left > (kMost - 1) * kSide) {
            across<kMost>(a, part, to, left);
            row += kMost * kSide;
        } else {
            across<1>(a, part, to, left);
            row += kSide;
        }
    }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
