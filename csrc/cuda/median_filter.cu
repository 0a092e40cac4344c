#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kColumns = 32, kRows = 2 * kThreads / kColumns;  // of a block's tile; a thread has two rows

// Two windows, one above the other. `Keys` is the array of the tile.
template <int SIZE>
struct Medians {  // by networks, which fit into the registers
    template <class Keys>
    static __device__ __forceinline__ void find(const Keys& keys, int y, int x, int, int32_t infinity,
                                                int32_t (&medians)[2]) {
        using Share = MedianShare<SIZE>;
        constexpr int count = SIZE * Share::kRows;
        int32_t shared[count];
#pragma unroll
        for (int i = 0; i < count; ++i) shared[i] = keys[y + 1 + i / SIZE][x + i % SIZE];
        sort<count, true>(shared);
        const bool nan = median_is_nan(shared[0], infinity) || median_is_nan(shared[count - 1], infinity);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            int32_t row[SIZE];
#pragma unroll
            for (int j = 0; j < SIZE; ++j) row[j] = keys[y + k * SIZE][x + j];
            sort<SIZE, true>(row);
            const bool any = nan || median_is_nan(row[0], infinity) || median_is_nan(row[SIZE - 1], infinity);
            medians[k] = any ? median_nan(infinity) : median_of<SIZE>(shared + Share::kLow, row);
        }
    }
};

template <>
struct Medians<0> {  // of any size
    template <class Keys>
    static __device__ __forceinline__ void find(const Keys& keys, int y, int x, int size, int32_t infinity,
                                                int32_t (&medians)[2]) {
        for (int k = 0; k < 2; ++k)
            medians[k] = median_bisect([&](int i, int j) { return keys[y + k + i][x + j]; }, size, infinity);
    }
};

// A tile of a plane for each block, by strides, so any size fits the grid; a plane has `tiles` of them,
// `across` side by side. Bits: an integer as wide as the stored type.
template <int SIZE, class Bits>
__global__ void __launch_bounds__(kThreads) median_kernel(MedianFilter a, int64_t across, int64_t tiles) {
    constexpr int most = (SIZE ? SIZE : kMedianSizes) - 1;
    __shared__ int32_t keys[kRows + most][kColumns + most];
    const int size = SIZE ? SIZE : a.size;
    const int32_t infinity = median_infinity(a.dtype);
    const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns * 2;
    for (int64_t block = blockIdx.x; block < a.planes * tiles; block += gridDim.x) {
        const int64_t top = block % tiles / across * kRows, left = block % tiles % across * kColumns;
        const Bits* plane = static_cast<const Bits*>(a.x) + block / tiles * a.height * a.width;
        Bits* out = static_cast<Bits*>(a.out) + block / tiles * a.height * a.width;
        __syncthreads();  // the last tile's readers are done
        const int wide = kColumns + size - 1, count = (kRows + size - 1) * wide;
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const int64_t y = within(top + i / wide - size / 2, a.height);
            const int64_t x = within(left + i % wide - size / 2, a.width);
            keys[i / wide][i % wide] = median_key(plane[y * a.width + x]);
        }
        __syncthreads();
        int32_t medians[2];
        Medians<SIZE>::find(keys, row, column, size, infinity, medians);
#pragma unroll
        for (int k = 0; k < 2; ++k)
            if (top + row + k < a.height && left + column < a.width)
                out[(top + row + k) * a.width + left + column] = median_key(static_cast<Bits>(medians[k]));
    }
}

template <class Bits>
void launch(const MedianFilter& a, cudaStream_t stream) {
    const int64_t across = ceil_div(a.width, kColumns), tiles = across * ceil_div(a.height, kRows);
    const unsigned grid = blocks_for(a.planes * tiles * kThreads);
    if (a.size == 3)
        median_kernel<3, Bits><<<grid, kThreads, 0, stream>>>(a, across, tiles);
    else if (a.size == 5)
        median_kernel<5, Bits><<<grid, kThreads, 0, stream>>>(a, across, tiles);
    else
        median_kernel<0, Bits><<<grid, kThreads, 0, stream>>>(a, across, tiles);
}

}  // namespace

int median_filter(const MedianFilter& a, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    if (a.dtype == Dtype::f32)
        launch<int32_t>(a, stream);
    else
        launch<int16_t>(a, stream);
    return cudaGetLastError();
}

}  // namespace pumice
