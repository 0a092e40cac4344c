#include "cpu/bilateral_filter.h"

#include "cpu/tile.h"
#include "cpu/vector.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

// A tile is kOut pixels wide; the last vector may work on what lies to the right of it.
constexpr int kOut = 256;
constexpr int kWide = kOut + kBilateralSizes - 1 + kLanes<float>;

template <int CHANNELS>
struct Tile {
    int64_t left;  // the first column
    float rows[kBilateralSizes][CHANNELS][kWide];
};

// Row y of the picture, mirrored at its edges.
template <int CHANNELS>
void load_row(const BilateralFilter& a, int64_t picture, int64_t y, Tile<CHANNELS>& tile) {
    const int64_t radius = a.size / 2, slot = (y + radius) % a.size, first = tile.left - radius;
    const int64_t count = kOut + a.size - 1;
    const int64_t inside = first < 0 ? -first : 0;  // columns [inside, outside) exist
    const int64_t outside = a.width - first < count ? a.width - first : count;
    for (int64_t c = 0; c < CHANNELS; ++c) {
        const int64_t from = ((picture * CHANNELS + c) * a.height + reflected(y, a.height)) * a.width;
        float* row = tile.rows[slot][c];
        const float* run = load_run(a.x, a.dtype, from + first + inside, outside - inside, row + inside);
        if (run != row + inside) memcpy(row + inside, run, (outside - inside) * sizeof(float));
        for (int64_t i = 0; i < inside; ++i)
            row[i] = load_one(a.x, a.dtype, from + reflected(first + i, a.width));
        for (int64_t i = outside; i < count; ++i)
            row[i] = load_one(a.x, a.dtype, from + reflected(first + i, a.width));
        for (int64_t i = count; i < kWide; ++i) row[i] = 0;
    }
}

template <int CHANNELS>
void filter_row(const BilateralFilter& a, int64_t y, int64_t wide, const Tile<CHANNELS>& tile,
                float (*out)[kWide]) {
    using V = Vector<float>;
    const int radius = a.size / 2;
    int reach[kBilateralSizes];
    const float (*rows[kBilateralSizes])[kWide];
    for (int i = 0; i < a.size; ++i) {
        reach[i] = bilateral_reach(radius, i - radius);
        rows[i] = tile.rows[(y + i) % a.size];
    }
    for (int64_t x = 0; x < wide; x += kLanes<float>) {
        V center[CHANNELS], sums[CHANNELS] = {}, weights = {};
        PUMICE_UNROLL
        for (int c = 0; c < CHANNELS; ++c) load<float>(center[c], rows[radius][c] + x + radius);
        for (int i = 0; i < a.size; ++i) {
            const int dy = i - radius;
            for (int dx = -reach[i]; dx <= reach[i]; ++dx) {
                V other[CHANNELS];
                PUMICE_UNROLL
                for (int c = 0; c < CHANNELS; ++c) load<float>(other[c], rows[i][c] + x + radius + dx);
                const float space = a.space * static_cast<float>(dx * dx + dy * dy);
                const V weight = bilateral_weight<Vector<int32_t>>(center, other, space, a.color);
                weights += weight;
                PUMICE_UNROLL
                for (int c = 0; c < CHANNELS; ++c) sums[c] += weight * other[c];
            }
        }
        PUMICE_UNROLL
        for (int c = 0; c < CHANNELS; ++c) store<float>(out[c] + x, sums[c] / weights);
    }
}

template <int CHANNELS>
void filter(const BilateralFilter& a, int64_t picture, int64_t begin, int64_t end) {
    const int64_t radius = a.size / 2;
    Tile<CHANNELS> tile;
    float result[CHANNELS][kWide];
    for (tile.left = 0; tile.left < a.width; tile.left += kOut) {
        const int64_t wide = a.width - tile.left < kOut ? a.width - tile.left : kOut;
        for (int64_t y = begin - radius; y < begin + radius; ++y) load_row(a, picture, y, tile);
        for (int64_t y = begin; y < end; ++y) {
            load_row(a, picture, y + radius, tile);
            filter_row(a, y, wide, tile, result);
            for (int64_t c = 0; c < CHANNELS; ++c) {
                const int64_t to = ((picture * CHANNELS + c) * a.height + y) * a.width + tile.left;
                if (a.dtype == Dtype::f32)
                    memcpy(static_cast<float*>(a.out) + to, result[c], wide * sizeof(float));
                else
                    store_run(a.out, a.dtype, to, wide, result[c]);
            }
        }
    }
}

}  // namespace

void bilateral_filter_rows(const BilateralFilter& a, int64_t picture, int64_t begin, int64_t end) {
    switch (a.channels) {
        case 1:
            return filter<1>(a, picture, begin, end);
        case 2:
            return filter<2>(a, picture, begin, end);
        case 3:
            return filter<3>(a, picture, begin, end);
        case 4:
            return filter<4>(a, picture, begin, end);
    }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
