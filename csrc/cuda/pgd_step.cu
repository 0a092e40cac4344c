#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

// Samples along y, elements along x, V at a time; both by strides, so any size fits the grid.
template <class G, int V>
__global__ void __launch_bounds__(kThreads) linf_kernel(PgdStep a) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kThreads * V;
    for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
        const float step = a.steps ? a.steps[sample] : a.step;
        const float* x_sample = a.x + sample * a.x_stride;
        const float* x0_sample = a.x0 + sample * a.x0_stride;
        const G* grad_sample = static_cast<const G*>(a.grad) + sample * a.grad_stride;
        float* out_sample = a.out + sample * a.out_stride;
        for (int64_t i = first; i < a.size; i += hop) {
            float x[V], x0[V], grad[V];
            load<float, V>(x_sample + i, x);
            load<float, V>(x0_sample + i, x0);
            load<G, V>(grad_sample + i, grad);
#pragma unroll
            for (int k = 0; k < V; ++k) x[k] = pgd_linf(x[k], grad[k], x0[k], step, a.eps, a.lower, a.upper);
            store<float, V>(out_sample + i, x);
        }
    }
}

// Block x sums every gridDim.x-th stretch of the sample in a fixed order.
template <class G, int V>
__global__ void __launch_bounds__(kThreads) sums_kernel(PgdStep a, PgdSums* sums) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kThreads * V;
    for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
        const float* x_sample = a.x + sample * a.x_stride;
        const float* x0_sample = a.x0 + sample * a.x0_stride;
        const G* grad_sample = static_cast<const G*>(a.grad) + sample * a.grad_stride;
        PgdSums total = {0, 0, 0};
        for (int64_t i = first; i < a.size; i += hop) {
            float x[V], x0[V], grad[V];
            load<float, V>(x_sample + i, x);
            load<float, V>(x0_sample + i, x0);
            load<G, V>(grad_sample + i, grad);
            float gg = 0, dg = 0, dd = 0;  // V terms in float, then double: doubles are slow on most GPUs
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float delta = x[k] - x0[k];
                gg += grad[k] * grad[k];
                dg += delta * grad[k];
                dd += delta * delta;
            }
            total.gg += gg;
            total.dg += dg;
            total.dd += dd;
        }
        total.gg = block_sum(total.gg);
        total.dg = block_sum(total.dg);
        total.dd = block_sum(total.dd);
        if (threadIdx.x == 0) sums[sample * gridDim.x + blockIdx.x] = total;
    }
}

template <class G, int V>
__global__ void __launch_bounds__(kThreads) l2_kernel(PgdStep a, const PgdSums* sums, int chunks) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kThreads * V;
    for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
        PgdSums total = {0, 0, 0};
        for (int c = threadIdx.x; c < chunks; c += kThreads) {
            const PgdSums part = sums[sample * chunks + c];
            total.gg += part.gg;
            total.dg += part.dg;
            total.dd += part.dd;
        }
        total.gg = block_sum(total.gg);
        total.dg = block_sum(total.dg);
        total.dd = block_sum(total.dd);
        const PgdScales scales = pgd_l2_scales(total, a.steps ? a.steps[sample] : a.step, a.eps);
        const float* x_sample = a.x + sample * a.x_stride;
        const float* x0_sample = a.x0 + sample * a.x0_stride;
        const G* grad_sample = static_cast<const G*>(a.grad) + sample * a.grad_stride;
        float* out_sample = a.out + sample * a.out_stride;
        for (int64_t i = first; i < a.size; i += hop) {
            float x[V], x0[V], grad[V];
            load<float, V>(x_sample + i, x);
            load<float, V>(x0_sample + i, x0);
            load<G, V>(grad_sample + i, grad);
#pragma unroll
            for (int k = 0; k < V; ++k) x[k] = pgd_l2(x[k], grad[k], x0[k], scales, a.lower, a.upper);
            store<float, V>(out_sample + i, x);
        }
    }
}

// Calls function(G(), V): the gradient's type, and how many elements go at a time.
template <class Function>
void specialize(const PgdStep& a, const Function& function) {
    with_type(a.grad_dtype, [&](auto grad) {
        constexpr int kWide = 16 / sizeof(grad);
        const bool wide = a.size % kWide == 0 && vectors<kWide>(a.out, 4, a.out_stride) &&
                          vectors<kWide>(a.x, 4, a.x_stride) && vectors<kWide>(a.x0, 4, a.x0_stride) &&
                          vectors<kWide>(a.grad, sizeof(grad), a.grad_stride);
        if (wide)
            function(grad, std::integral_constant<int, kWide>());
        else
            function(grad, std::integral_constant<int, 1>());
    });
}

}  // namespace

int pgd_step_linf(const PgdStep& a, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    specialize(a, [&](auto grad, auto wide) {
        const dim3 grid(blocks_for(ceil_div(a.size, wide)), batch_blocks(a.batch));
        linf_kernel<decltype(grad), wide><<<grid, kThreads, 0, stream>>>(a);
    });
    return cudaGetLastError();
}

int pgd_step_l2(const PgdStep& a, PgdSums* workspace, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    const int chunks = static_cast<int>(pgd_step_chunks(a.size));
    specialize(a, [&](auto grad, auto wide) {
        using G = decltype(grad);
        sums_kernel<G, wide><<<dim3(chunks, batch_blocks(a.batch)), kThreads, 0, stream>>>(a, workspace);
        const dim3 grid(blocks_for(ceil_div(a.size, wide)), batch_blocks(a.batch));
        l2_kernel<G, wide><<<grid, kThreads, 0, stream>>>(a, workspace, chunks);
    });
    return cudaGetLastError();
}

}  // namespace pumice
