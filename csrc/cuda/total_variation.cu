#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 31;  // that a warp writes: its first lane is there for the dual on their left
constexpr int kRows = 16;     // that a warp goes down, with the dual of the row above in its registers

// What is read and what is written of (ahead, right, down): neighbours still need the old ones.
struct TvState {
    float *ahead, *right, *down;
};

template <bool Isotropic>
__global__ void __launch_bounds__(kThreads)
    step_kernel(TotalVariation a, TvState now, TvState after, TvStep step, int64_t strips, int64_t groups) {
    const int lane = threadIdx.x % 32;
    const int64_t items = a.samples * a.channels * strips * groups;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32; item < items;
         item += hop) {
        const int64_t column = item % groups * kColumns + lane - 1;
        const int64_t plane = item / groups / strips, first = item / groups % strips * kRows;
        const int64_t end = first + kRows < a.height ? first + kRows : a.height;
        const bool exists = column >= 0 && column < a.width, on_right = exists && column + 1 < a.width;
        const float weight = a.weights ? a.weights[plane / a.channels] : a.weight;
        int64_t row = first > 0 ? first - 1 : 0;
        int64_t at = (plane * a.height + row) * a.width + column;
        float ahead = exists ? now.ahead[at] : 0.0f, above = 0;
        for (; row < end; ++row, at += a.width) {
            const float below = exists && row + 1 < a.height ? now.ahead[at + a.width] : ahead;
            const float beside = on_right ? now.ahead[at + 1] : ahead;
            float right = exists ? now.right[at] + step.sigma * (beside - ahead) : 0.0f;
            float down = exists ? now.down[at] + step.sigma * (below - ahead) : 0.0f;
            tv_project(right, down, weight, Isotropic);
            const float left = __shfl_up_sync(0xffffffffu, right, 1);  // 0 from beyond the edge
            if (row >= first && lane > 0 && exists) {
                float x = a.out[at], next;
                tv_descend(x, next, a.images[at] + (right - left) + (down - above), step);
                a.out[at] = x;
                after.ahead[at] = next;
                after.right[at] = right;
                after.down[at] = down;
            }
            above = down;
            ahead = below;
        }
    }
}

}  // namespace

int total_variation(const TotalVariation& a, float* workspace, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    const int64_t size = a.samples * a.channels * a.height * a.width;
    const size_t bytes = static_cast<size_t>(size) * sizeof(float);
    TvState now = {workspace, workspace + size, workspace + 2 * size};
    TvState after = {workspace + 3 * size, workspace + 4 * size, workspace + 5 * size};
    cudaMemcpyAsync(a.out, a.images, bytes, cudaMemcpyDeviceToDevice, stream);
    cudaMemcpyAsync(now.ahead, a.images, bytes, cudaMemcpyDeviceToDevice, stream);
    cudaMemsetAsync(now.right, 0, 2 * bytes, stream);
    const int64_t strips = ceil_div(a.height, kRows), groups = ceil_div(a.width, kColumns);
    const unsigned blocks = blocks_for(a.samples * a.channels * strips * groups * 32);
    TvSteps steps;
    for (int i = 0; i < a.iterations; ++i) {
        const auto kernel = a.isotropic ? step_kernel<true> : step_kernel<false>;
        kernel<<<blocks, kThreads, 0, stream>>>(a, now, after, steps.next(), strips, groups);
        const TvState written = after;
        after = now;
        now = written;
    }
    return cudaGetLastError();
}

}  // namespace pumice
