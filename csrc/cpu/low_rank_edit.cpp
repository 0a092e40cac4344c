#include "cpu/low_rank_edit.h"

#include "cpu/tile.h"

namespace pumice {
namespace PUMICE_ISA {

namespace {
// As many ranks at a time as leave the sums of all rows in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRanks = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRanks = 1;
#else
constexpr int kLanes = 4, kRanks = 1;
#endif
constexpr int64_t kEditTile = 2048;  // columns converted at a time: whole rows of the usual models

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

template <class V>
PUMICE_INLINE V load(const float* from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

PUMICE_INLINE float sum(Lanes value) {
    float lanes[kLanes];
    memcpy(lanes, &value, sizeof value);
    Four total = load<Four>(lanes);
    for (int i = 4; i < kLanes; i += 4) total += load<Four>(lanes + i);
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// u[k][i] += the dot products of n columns of the rows with those of RANKS rows of D transposed.
template <int ROWS, int RANKS>
PUMICE_INLINE void project(const float* const (&rows)[ROWS], const float* up, int64_t stride, int64_t n,
                           float* u) {
    Lanes sums[ROWS][RANKS] = {}, w[ROWS], d[RANKS];
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int i = 0; i < ROWS; ++i) w[i] = load<Lanes>(rows[i] + j);
        for (int k = 0; k < RANKS; ++k) d[k] = load<Lanes>(up + k * stride + j);
        low_rank_project(w, d, sums);
    }
    float tail[ROWS][RANKS] = {}, w_tail[ROWS], d_tail[RANKS];
    for (; j < n; ++j) {
        for (int i = 0; i < ROWS; ++i) w_tail[i] = rows[i][j];
        for (int k = 0; k < RANKS; ++k) d_tail[k] = up[k * stride + j];
        low_rank_project(w_tail, d_tail, tail);
    }
    for (int k = 0; k < RANKS; ++k)
        for (int i = 0; i < ROWS; ++i) u[k * kEditRows + i] += sum(sums[i][k]) + tail[i][k];
}

// to[i][j] = rows[i][j] + u[:, i] . B[:, j] for the V that starts at column j, and VECTORS - 1 after it.
template <class V, int ROWS, int VECTORS>
PUMICE_INLINE void update(const float* const (&rows)[ROWS], float* const (&to)[ROWS], const LowRankEdit& a,
                          const float* down, const float* u, int64_t j) {
    constexpr int kWidth = sizeof(V) / sizeof(float);
    V delta[VECTORS][ROWS] = {};
    for (int64_t k = 0; k < a.rank; ++k)
        for (int c = 0; c < VECTORS; ++c)
            low_rank_expand(u + k * kEditRows, load<V>(down + k * a.columns + j + c * kWidth), delta[c]);
    for (int i = 0; i < ROWS; ++i)
        for (int c = 0; c < VECTORS; ++c) {
            const V edited = load<V>(rows[i] + j + c * kWidth) + delta[c][i];
            memcpy(to[i] + j + c * kWidth, &edited, sizeof edited);
        }
}

template <int ROWS>
PUMICE_INLINE void edit(const LowRankEdit& a, const LowRankMatrix& matrix, int64_t begin, float* u) {
    float buffer[ROWS][kEditTile];
    const float* from[ROWS];
    float* to[ROWS];
    const int64_t tile = a.dtype == Dtype::f32 ? a.columns : kEditTile;  // float32 is used where it lies
    memset(u, 0, static_cast<size_t>(a.rank * kEditRows) * sizeof(float));
    for (int64_t j = 0; j < a.columns; j += tile) {
        const int64_t n = a.columns - j < tile ? a.columns - j : tile;
        for (int i = 0; i < ROWS; ++i)
            from[i] = load_run(matrix.data, a.dtype, (begin + i) * matrix.stride + j, n, buffer[i]);
        int64_t k = 0;
        for (; k + kRanks <= a.rank; k += kRanks)
            project<ROWS, kRanks>(from, a.up + k * a.columns + j, a.columns, n, u + k * kEditRows);
        for (; k < a.rank; ++k)
            project<ROWS, 1>(from, a.up + k * a.columns + j, a.columns, n, u + k * kEditRows);
    }
    for (int64_t j = 0; j < a.columns; j += tile) {
        const int64_t n = a.columns - j < tile ? a.columns - j : tile;
        for (int i = 0; i < ROWS; ++i) {
            const int64_t offset = (begin + i) * matrix.stride + j;
            // A row that is a single tile was loaded above.
            if (a.columns > tile) from[i] = load_run(matrix.data, a.dtype, offset, n, buffer[i]);
            to[i] = open_run(matrix.data, a.dtype, offset, buffer[i]);
        }
        int64_t c = 0;
        for (; c + 2 * kLanes <= n; c += 2 * kLanes) update<Lanes, ROWS, 2>(from, to, a, a.down + j, u, c);
        for (; c + kLanes <= n; c += kLanes) update<Lanes, ROWS, 1>(from, to, a, a.down + j, u, c);
        for (; c < n; ++c) update<float, ROWS, 1>(from, to, a, a.down + j, u, c);
        for (int i = 0; i < ROWS; ++i)
            store_run(matrix.data, a.dtype, (begin + i) * matrix.stride + j, n, buffer[i]);
    }
}
}  // namespace

void low_rank_edit(const LowRankEdit& a, const LowRankMatrix& matrix, int64_t begin, int64_t rows, float* u) {
    if (rows == kEditRows)
        edit<kEditRows>(a, matrix, begin, u);
    else
        for (int64_t row = begin; row < begin + rows; ++row) edit<1>(a, matrix, row, u);
}

}  // namespace PUMICE_ISA
}  // namespace pumice
