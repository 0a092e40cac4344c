// Both passes have the same three steps: a reduction to a partial result for each channel and chunk, a merge
// over each group in a fixed order, and an elementwise kernel. (batch, channels, size) and channels_last
// differ in how threads walk: along a channel, or along the channels.
#include <type_traits>

#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kWarps = kThreads / 32;
// channels_last: a block is 8 packs of channels wide, a whole 128-byte line, and 32 rows high.
constexpr int kColumns = 8;
constexpr int kRows = kThreads / kColumns;

struct Sums {  // of dz and of dz * normal
    float dz, dzn;
};

__device__ __forceinline__ Sums merge(Sums a, Sums b) { return {a.dz + b.dz, a.dzn + b.dzn}; }

__device__ __forceinline__ Moments shuffle(Moments m, int offset) {
    return {__shfl_xor_sync(0xffffffffu, m.count, offset), __shfl_xor_sync(0xffffffffu, m.mean, offset),
            __shfl_xor_sync(0xffffffffu, m.m2, offset)};
}
__device__ __forceinline__ Sums shuffle(Sums s, int offset) {
    return {__shfl_xor_sync(0xffffffffu, s.dz, offset), __shfl_xor_sync(0xffffffffu, s.dzn, offset)};
}

struct Channel {
    float mean, rstd, weight, bias;
};

__device__ __forceinline__ Channel channel_of(const GroupNormSilu& a, int64_t sample, int64_t c) {
    const int64_t group = sample * a.groups + c / a.per_group();
    return {a.mean[group], a.rstd[group], load_one(a.weight, a.weight_dtype, c),
            load_one(a.bias, a.bias_dtype, c)};
}

// What a reduction adds up. `add` takes V elements of one channel at once, or one element each of V channels.
template <class T>
struct MomentsOf {
    using Result = Moments;
    static constexpr Result kZero = {0, 0, 0};
    __device__ static void begin(const GroupNormSilu&, int64_t, int64_t, Channel&) {}

    template <int V>
    __device__ static void add(const float (&x)[V], const float (&)[V], const Channel&, Moments& to) {
        float mean = 0, m2 = 0;
#pragma unroll
        for (int k = 0; k < V; ++k) mean += x[k];
        mean /= V;
#pragma unroll
        for (int k = 0; k < V; ++k) m2 += (x[k] - mean) * (x[k] - mean);
        to = pumice::merge(to, {static_cast<float>(V), mean, m2});
    }
    __device__ static void add_one(float x, float, const Channel&, float inverse_count, Moments& to) {
        const float delta = x - to.mean;
        to.count += 1;
        to.mean += delta * inverse_count;
        to.m2 += delta * (x - to.mean);
    }
};

template <class T>
struct SumsOf {
    using Result = Sums;
    static constexpr Result kZero = {0, 0};
    __device__ static void begin(const GroupNormSilu& a, int64_t sample, int64_t c, Channel& channel) {
        channel = channel_of(a, sample, c);
    }

    template <int V>
    __device__ static void add(const float (&x)[V], const float (&dy)[V], const Channel& channel, Sums& to) {
#pragma unroll
        for (int k = 0; k < V; ++k) add_one(x[k], dy[k], channel, 0, to);
    }
    __device__ static void add_one(float x, float dy, const Channel& c, float, Sums& to) {
        const GroupNormGrad grad = group_norm_grad(x, dy, c.mean, c.rstd, c.weight, c.bias);
        to.dz += grad.dz;
        to.dzn += grad.dz * grad.normal;
    }
};

// (batch, channels, size): a warp for each channel's chunk. partial is (batch, channels, chunks).
template <class T, int V, class Of, bool Backward>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(GroupNormSilu a, const T* dy, int64_t chunk, int64_t chunks, typename Of::Result* partial) {
    const int64_t items = a.batch * a.channels * chunks;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kWarps;
    const int lane = threadIdx.x % 32;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; item < items;
         item += hop) {
        const int64_t row = item / chunks, begin = item % chunks * chunk;
        const int64_t end = begin + chunk < a.size ? begin + chunk : a.size;
        const T* x_row = static_cast<const T*>(a.x) + row * a.size;
        Channel channel = {};
        Of::begin(a, row / a.channels, row % a.channels, channel);
        typename Of::Result total = Of::kZero;
        for (int64_t i = begin + lane * V; i < end; i += 32 * V) {
            float x[V], g[V] = {};
            load<T, V>(x_row + i, x);
            if constexpr (Backward) load<T, V>(dy + row * a.size + i, g);
            Of::add(x, g, channel, total);
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) total = merge(total, shuffle(total, offset));
        if (lane == 0) partial[item] = total;
    }
}

// channels_last: a block for a stretch of rows and kColumns packs of channels. partial is (batch, chunks,
// channels).
template <class T, int V, class Of, bool Backward>
__global__ void __launch_bounds__(kThreads)
    reduce_rows_kernel(GroupNormSilu a, const T* dy, int64_t chunk, typename Of::Result* partial) {
    using Result = typename Of::Result;
    __shared__ Result shared[kWarps][kColumns][V];
    const int column = threadIdx.x % kColumns;
    const int64_t c = (static_cast<int64_t>(blockIdx.y) * kColumns + column) * V;
    const int64_t begin = blockIdx.x * chunk;
    const int64_t end = begin + chunk < a.size ? begin + chunk : a.size;
    for (int64_t sample = blockIdx.z; sample < a.batch; sample += gridDim.z) {
        Result total[V];
        Channel channel[V] = {};
#pragma unroll
        for (int k = 0; k < V; ++k) {
            total[k] = Of::kZero;
            if (c < a.channels) Of::begin(a, sample, c + k, channel[k]);
        }
        float count = 0;
        for (int64_t row = begin + threadIdx.x / kColumns; c < a.channels && row < end; row += kRows) {
            const int64_t at = (sample * a.size + row) * a.channels + c;
            float x[V], g[V] = {};
            load<T, V>(static_cast<const T*>(a.x) + at, x);
            if constexpr (Backward) load<T, V>(dy + at, g);
            count += 1;
            const float inverse = 1.0f / count;
#pragma unroll
            for (int k = 0; k < V; ++k) Of::add_one(x[k], g[k], channel[k], inverse, total[k]);
        }
        __syncthreads();  // the last sample's readers are done
#pragma unroll
        for (int k = 0; k < V; ++k) {  // the rows of a warp lie kColumns lanes apart
            total[k] = merge(total[k], shuffle(total[k], 16));
            total[k] = merge(total[k], shuffle(total[k], 8));
            if (threadIdx.x % 32 < kColumns) shared[threadIdx.x / 32][column][k] = total[k];
        }
        __syncthreads();
        if (threadIdx.x < kColumns && c < a.channels) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
                Result sum = shared[0][column][k];
                for (int warp = 1; warp < kWarps; ++warp) sum = merge(sum, shared[warp][column][k]);
                partial[(sample * gridDim.x + blockIdx.x) * a.channels + c + k] = sum;
            }
        }
    }
}

// Where the partial result of a channel's chunk lies.
__device__ __forceinline__ int64_t partial_at(const GroupNormSilu& a, int64_t sample, int64_t c, int64_t k,
                                              int64_t chunks) {
    return a.channels_last ? (sample * chunks + k) * a.channels + c : (sample * a.channels + c) * chunks + k;
}

// A warp for each group of each sample.
__global__ void __launch_bounds__(kThreads)
    merge_moments_kernel(GroupNormSilu a, float eps, const Moments* partial, int64_t chunks) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (item >= a.batch * a.groups) return;
    const int64_t sample = item / a.groups, first = item % a.groups * a.per_group();
    Moments total = {0, 0, 0};
    for (int64_t i = threadIdx.x % 32; i < a.per_group() * chunks; i += 32)
        total = merge(total, partial[partial_at(a, sample, first + i / chunks, i % chunks, chunks)]);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) total = merge(total, shuffle(total, offset));
    if (threadIdx.x % 32 == 0) {
        a.mean[item] = total.mean;
        a.rstd[item] = rsqrtf(total.m2 / total.count + eps);
    }
}

// A warp for each group: sums (batch, 2, channels) of its channels, and means (batch, groups) of weight times
// those.
__global__ void __launch_bounds__(kThreads)
    merge_sums_kernel(GroupNormSilu a, const Sums* partial, int64_t chunks, float* sums, Sums* means) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (item >= a.batch * a.groups) return;
    const int64_t sample = item / a.groups, first = item % a.groups * a.per_group();
    Sums group = {0, 0};
    for (int64_t c = first; c < first + a.per_group(); ++c) {
        Sums total = {0, 0};
        for (int64_t k = threadIdx.x % 32; k < chunks; k += 32)
            total = merge(total, partial[partial_at(a, sample, c, k, chunks)]);
#pragma unroll
        for (int offset = 16; offset; offset /= 2) total = merge(total, shuffle(total, offset));
        if (threadIdx.x % 32 == 0) {
            sums[sample * 2 * a.channels + c] = total.dz;
            sums[(sample * 2 + 1) * a.channels + c] = total.dzn;
        }
        const float weight = load_one(a.weight, a.weight_dtype, c);
        group = {group.dz + weight * total.dz, group.dzn + weight * total.dzn};
    }
    const float count = static_cast<float>(a.per_group()) * static_cast<float>(a.size);
    if (threadIdx.x % 32 == 0) means[item] = {group.dz / count, group.dzn / count};
}

// Writes y, or dx where Backward. A block is a tile of rows (of a channel's elements, or of a position's
// channels) and packs; the tile's shape comes with the launch, so that short rows do not leave threads idle.
template <class T, int V, bool Backward>
__device__ __forceinline__ void apply(const GroupNormSilu& a, const T* dy, T* to, int64_t at,
                                      const Channel* channel, const Sums* means, int step) {
    float x[V], g[V] = {};
    load<T, V>(static_cast<const T*>(a.x) + at, x);
    if constexpr (Backward) load<T, V>(dy + at, g);
#pragma unroll
    for (int k = 0; k < V; ++k) {
        const Channel& c = channel[k * step];
        if constexpr (Backward) {
            const GroupNormGrad grad = group_norm_grad(x[k], g[k], c.mean, c.rstd, c.weight, c.bias);
            x[k] = group_norm_dx(grad, c.rstd, c.weight, means[k * step].dz, means[k * step].dzn);
        } else {
            x[k] = silu((x[k] - c.mean) * c.rstd * c.weight + c.bias);
        }
    }
    store<T, V>(to + at, x);
}

template <class T, int V, bool Backward>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(GroupNormSilu a, const T* dy, T* to, const Sums* group_means) {
    const int64_t rows = a.batch * a.channels;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
         row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
        const int64_t sample = row / a.channels, c = row % a.channels;
        const Channel channel = channel_of(a, sample, c);
        Sums means = {0, 0};
        if constexpr (Backward) means = group_means[sample * a.groups + c / a.per_group()];
        for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.size;
             i += static_cast<int64_t>(gridDim.x) * blockDim.x * V)
            apply<T, V, Backward>(a, dy, to, row * a.size + i, &channel, &means, 0);
    }
}

template <class T, int V, bool Backward>
__global__ void __launch_bounds__(kThreads)
    apply_rows_kernel(GroupNormSilu a, const T* dy, T* to, const Sums* group_means, int64_t chunk) {
    const int64_t c = (static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns) * V;
    if (c >= a.channels) return;
    const int64_t begin = blockIdx.x * chunk;
    const int64_t end = begin + chunk < a.size ? begin + chunk : a.size;
    for (int64_t sample = blockIdx.z; sample < a.batch; sample += gridDim.z) {
        Channel channel[V];
        Sums means[V] = {};
#pragma unroll
        for (int k = 0; k < V; ++k) {
            channel[k] = channel_of(a, sample, c + k);
            if constexpr (Backward) means[k] = group_means[sample * a.groups + (c + k) / a.per_group()];
        }
        for (int64_t row = begin + threadIdx.x / kColumns; row < end; row += kRows)
            apply<T, V, Backward>(a, dy, to, (sample * a.size + row) * a.channels + c, channel, means, 1);
    }
}

template <class T, int V, class Of, bool Backward>
void reduce(const GroupNormSilu& a, const T* dy, typename Of::Result* partial, cudaStream_t stream) {
    const int64_t chunk = group_norm_silu_chunk(a.size, a.channels_last);
    const int64_t chunks = ceil_div(a.size, chunk);
    if (a.channels_last) {
        const dim3 grid(static_cast<unsigned>(chunks),
                        static_cast<unsigned>(ceil_div(a.channels, kColumns * V)), batch_blocks(a.batch));
        reduce_rows_kernel<T, V, Of, Backward><<<grid, kThreads, 0, stream>>>(a, dy, chunk, partial);
    } else {
        const unsigned grid = blocks_for(a.batch * a.channels * chunks * 32);
        reduce_kernel<T, V, Of, Backward><<<grid, kThreads, 0, stream>>>(a, dy, chunk, chunks, partial);
    }
}

template <class T, int V, bool Backward>
void apply_all(const GroupNormSilu& a, const T* dy, T* to, const Sums* means, cudaStream_t stream) {
    if (a.channels_last) {
        const int64_t chunk = group_norm_silu_chunk(a.size, true);
        const dim3 grid(static_cast<unsigned>(ceil_div(a.size, chunk)),
                        static_cast<unsigned>(ceil_div(a.channels, kColumns * V)), batch_blocks(a.batch));
        apply_rows_kernel<T, V, Backward><<<grid, kThreads, 0, stream>>>(a, dy, to, means, chunk);
        return;
    }
    unsigned width = 8;
    while (width < kThreads && width * V < a.size) width *= 2;
    const dim3 block(width, kThreads / width);
    const int64_t columns = ceil_div(a.size, static_cast<int64_t>(width) * V);
    const dim3 grid(static_cast<unsigned>(columns < 1024 ? columns : 1024),
                    batch_blocks(ceil_div(a.batch * a.channels, block.y)));
    apply_kernel<T, V, Backward><<<grid, block, 0, stream>>>(a, dy, to, means);
}

unsigned warps_for(int64_t items) { return static_cast<unsigned>(ceil_div(items, kWarps)); }

// Calls function(T(), V) with the storage type and how many elements go at a time.
template <class Function>
void specialize(const GroupNormSilu& a, const void* other, const void* result, const Function& function) {
    with_type(a.dtype, [&](auto type) {
        constexpr int kWide = 16 / sizeof(type);
        const int64_t row = a.channels_last ? a.channels : a.size;
        const bool wide = vectors<kWide>(a.x, sizeof(type), row) &&
                          vectors<kWide>(other, sizeof(type), row) &&
                          vectors<kWide>(result, sizeof(type), row);
        if (wide)
            function(type, std::integral_constant<int, kWide>());
        else
            function(type, std::integral_constant<int, 1>());
    });
}

}  // namespace

int group_norm_silu(const GroupNormSilu& a, void* y, float eps, void* workspace, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    auto* partial = static_cast<Moments*>(workspace);
    specialize(a, nullptr, y, [&](auto type, auto wide) {
        using T = decltype(type);
        const int64_t chunks = ceil_div(a.size, group_norm_silu_chunk(a.size, a.channels_last));
        reduce<T, wide, MomentsOf<T>, false>(a, nullptr, partial, stream);
        merge_moments_kernel<<<warps_for(a.batch * a.groups), kThreads, 0, stream>>>(a, eps, partial, chunks);
        apply_all<T, wide, false>(a, nullptr, static_cast<T*>(y), nullptr, stream);
    });
    return cudaGetLastError();
}

int group_norm_silu_backward(const GroupNormSilu& a, const void* dy, void* dx, float* sums, void* workspace,
                             Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    auto* means = static_cast<Sums*>(workspace);
    Sums* partial = means + a.batch * a.groups;
    specialize(a, dy, dx, [&](auto type, auto wide) {
        using T = decltype(type);
        const int64_t chunks = ceil_div(a.size, group_norm_silu_chunk(a.size, a.channels_last));
        reduce<T, wide, SumsOf<T>, true>(a, static_cast<const T*>(dy), partial, stream);
        merge_sums_kernel<<<warps_for(a.batch * a.groups), kThreads, 0, stream>>>(a, partial, chunks, sums,
                                                                                  means);
        apply_all<T, wide, true>(a, static_cast<const T*>(dy), static_cast<T*>(dx), means, stream);
    });
    return cudaGetLastError();
}

}  // namespace pumice
