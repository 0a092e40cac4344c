#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kColumns = 32, kRows = kThreads / kColumns;  // of a block's tile; a thread has one pixel

// A tile of a picture for each block, by strides, so any size fits the grid; a picture has `tiles` of them,
// `across` side by side.
template <class T, int CHANNELS>
__global__ void __launch_bounds__(kThreads)
    bilateral_kernel(BilateralFilter a, int64_t across, int64_t tiles) {
    extern __shared__ float pixels[];  // (CHANNELS, tall, wide)
    const int radius = a.size / 2, wide = kColumns + 2 * radius, tall = kRows + 2 * radius;
    const int64_t plane = a.height * a.width;
    const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
    for (int64_t block = blockIdx.x; block < a.batch * tiles; block += gridDim.x) {
        const int64_t top = block % tiles / across * kRows, left = block % tiles % across * kColumns;
        const T* from = static_cast<const T*>(a.x) + block / tiles * CHANNELS * plane;
        __syncthreads();  // the last tile's readers are done
        for (int i = threadIdx.x; i < tall * wide; i += kThreads) {
            const int64_t y = reflected(top + i / wide - radius, a.height);
            const int64_t x = reflected(left + i % wide - radius, a.width);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c)
                pixels[c * tall * wide + i] = to_float(from[c * plane + y * a.width + x]);
        }
        __syncthreads();
        const float* middle = pixels + (row + radius) * wide + column + radius;
        float center[CHANNELS], sums[CHANNELS] = {}, weights = 0;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) center[c] = middle[c * tall * wide];
        for (int dy = -radius; dy <= radius; ++dy) {
            const int reach = bilateral_reach(radius, dy);
            for (int dx = -reach; dx <= reach; ++dx) {
                float other[CHANNELS];
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) other[c] = middle[c * tall * wide + dy * wide + dx];
                const float space = a.space * static_cast<float>(dx * dx + dy * dy);
                const float weight = bilateral_weight<int32_t>(center, other, space, a.color);
                weights += weight;
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) sums[c] += weight * other[c];
            }
        }
        if (top + row < a.height && left + column < a.width) {
            T* to = static_cast<T*>(a.out) + block / tiles * CHANNELS * plane;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c)
                to[c * plane + (top + row) * a.width + left + column] = from_float<T>(sums[c] / weights);
        }
    }
}

template <int CHANNELS>
void launch(const BilateralFilter& a, cudaStream_t stream) {
    const int64_t across = ceil_div(a.width, kColumns), tiles = across * ceil_div(a.height, kRows);
    const unsigned grid = blocks_for(a.batch * tiles * kThreads);
    const int bytes =
        CHANNELS * (kRows + a.size - 1) * (kColumns + a.size - 1) * static_cast<int>(sizeof(float));
    with_type(a.dtype, [&](auto type) {
        bilateral_kernel<decltype(type), CHANNELS><<<grid, kThreads, bytes, stream>>>(a, across, tiles);
    });
}

}  // namespace

int bilateral_filter(const BilateralFilter& a, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    if (a.channels == 1)
        launch<1>(a, stream);
    else if (a.channels == 2)
        launch<2>(a, stream);
    else if (a.channels == 3)
        launch<3>(a, stream);
    else
        launch<4>(a, stream);
    return cudaGetLastError();
}

}  // namespace pumice
