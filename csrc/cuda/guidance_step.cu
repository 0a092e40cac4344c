#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

// A thread takes V positions and walks their channels; sums over the block at the end. `Step` and `Sums` say
// which of the two results are wanted. Position stride 1, or, channels_last, as many as there are channels
// (then V is 1).
// Two blocks a multiprocessor: left alone, ptxas aims for four and spills.
template <class T, class M, int V, bool Step, bool Sums>
__global__ void __launch_bounds__(kThreads, 2)
    guidance_kernel(GuidanceStep a, int64_t chunk, float* sums, double* partial) {
    const int64_t position_stride = a.channels_last ? a.channels : 1;
    const int64_t channel_stride = a.channels_last ? 1 : a.positions;
    const int64_t begin = blockIdx.x * chunk;
    const int64_t end = begin + chunk < a.positions ? begin + chunk : a.positions;
    for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
        const M* cond_sample = static_cast<const M*>(a.cond) + sample * a.cond_stride;
        const M* uncond_sample = static_cast<const M*>(a.uncond) + sample * a.uncond_stride;
        float scale = 0;
        StepCoefficients c = {};
        PredictionMap map = {};
        if constexpr (Step) {
            scale = a.scales ? a.scales[sample] : a.scale;
            c = step_coefficients(a, sample);
            map = prediction_map(a.prediction, c.alpha, c.sigma);
        }
        float total[kGuidanceSums] = {};
        for (int64_t p = begin + threadIdx.x * V; p < end; p += kThreads * V) {
            PositionSums position[V] = {};
            for (int64_t channel = 0; channel < a.channels; ++channel) {
                const int64_t at = p * position_stride + channel * channel_stride;
                float cond[V], uncond[V];
                load<M, V>(cond_sample + at, cond);
                load<M, V>(uncond_sample + at, uncond);
                if constexpr (Sums) {
#pragma unroll
                    for (int k = 0; k < V; ++k) {
                        const float u = uncond[k], d = cond[k] - u;
                        position[k].dd += d * d;
                        position[k].uu += u * u;
                        position[k].du += d * u;
                    }
                }
                if constexpr (Step) {
                    float x[V], noise[V] = {};
                    load<T, V>(static_cast<const T*>(a.x) + sample * a.x_stride + at, x);
                    if (a.noise)
                        load<T, V>(static_cast<const T*>(a.noise) + sample * a.noise_stride + at, noise);
#pragma unroll
                    for (int k = 0; k < V; ++k)
                        x[k] = guidance_step(x[k], cond[k], uncond[k], noise[k], scale, map, c, a.clip);
                    store<T, V>(static_cast<T*>(a.out) + sample * a.out_stride + at, x);
                }
            }
            if constexpr (Sums) {
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    total[0] += position[k].dd;
                    total[1] += position[k].uu;
                    total[2] += position[k].du;
                    total[3] += guidance_cosine(position[k]);
                }
            }
        }
        if constexpr (Sums) {
#pragma unroll
            for (int i = 0; i < kGuidanceSums; ++i) {
                const double block = block_sum(static_cast<double>(total[i]));
                if (threadIdx.x == 0) {
                    if (gridDim.x == 1)
                        sums[sample * kGuidanceSums + i] = static_cast<float>(block);
                    else
                        partial[(sample * gridDim.x + blockIdx.x) * kGuidanceSums + i] = block;
                }
            }
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partial, int64_t count, int chunks, float* sums) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    double total = 0;
    for (int k = 0; k < chunks; ++k)
        total += partial[(i / kGuidanceSums * chunks + k) * kGuidanceSums + i % kGuidanceSums];
    sums[i] = static_cast<float>(total);
}

template <class T, class M, bool Step, bool Sums>
void launch(const GuidanceStep& a, float* sums, double* workspace, cudaStream_t stream) {
    constexpr int kWide = 16 / sizeof(M);
    bool wide = (!a.channels_last || a.channels == 1) && a.positions % kWide == 0 &&
                vectors<kWide>(a.cond, sizeof(M), a.cond_stride) &&
                vectors<kWide>(a.uncond, sizeof(M), a.uncond_stride);
    if (Step)
        wide = wide && vectors<kWide>(a.x, sizeof(T), a.x_stride) &&
               vectors<kWide>(a.out, sizeof(T), a.out_stride) &&
               vectors<kWide>(a.noise, sizeof(T), a.noise_stride);
    // Sums want few, long chunks, a step alone wants every thread.
    int64_t chunk =
        Sums ? guidance_step_chunk(a.positions) : static_cast<int64_t>(kThreads) * (wide ? kWide : 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.positions, chunk)), batch_blocks(a.batch));
    if (wide)
        guidance_kernel<T, M, kWide, Step, Sums><<<grid, kThreads, 0, stream>>>(a, chunk, sums, workspace);
    else
        guidance_kernel<T, M, 1, Step, Sums><<<grid, kThreads, 0, stream>>>(a, chunk, sums, workspace);
    if (Sums && grid.x > 1) {
        const int64_t count = a.batch * kGuidanceSums;
        finish_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(
            workspace, count, static_cast<int>(grid.x), sums);
    }
}

}  // namespace

int guidance_step(const GuidanceStep& a, float* sums, double* workspace, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    with_type(a.model_dtype, [&](auto model) {
        using M = decltype(model);
        const bool wide = a.dtype == Dtype::f32;  // x is of the model's type, or float32
        if (!a.out)
            launch<float, M, false, true>(a, sums, workspace, stream);
        else if (sums)
            wide ? launch<float, M, true, true>(a, sums, workspace, stream)
                 : launch<M, M, true, true>(a, sums, workspace, stream);
        else
            wide ? launch<float, M, true, false>(a, sums, workspace, stream)
                 : launch<M, M, true, false>(a, sums, workspace, stream);
    });
    return cudaGetLastError();
}

}  // namespace pumice
