// Two kernels each way: one codes and decodes a tile of four macroblocks in shared memory, the other looks
// at the chroma of neighbouring tiles, to decode the pictures or to take the gradient back. No atomics: every
// value is gathered.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kTileRows = 16, kTileColumns = 64;  // as four macroblocks: a thread has 2 x 2 pixels
constexpr int kBlocks = 24;                       // of 8 x 8: 16 of luma, 4 of each chroma
constexpr int kBlockRow = 9;                      // one more, so that rows and columns meet no bank twice
constexpr int kBlock = 8 * kBlockRow;

struct Tile {
    int64_t sample, top, left;
};

// Calls body(tile) for each tile of this block, by strides.
template <class Body>
__device__ __forceinline__ void each_tile(const DifferentiableJpeg& a, const Body& body) {
    const int64_t across = (a.padded_width() + kTileColumns - 1) / kTileColumns;
    const int64_t tiles = across * a.strips();
    for (int64_t item = blockIdx.x; item < tiles * a.batch; item += gridDim.x) {
        const int64_t tile = item % tiles;
        body(Tile{item / tiles, tile / across * kTileRows, tile % across * kTileColumns});
        __syncthreads();  // shared memory is free for the next one
    }
}

// Where a pixel of luma, or a sample of chroma, lies in the shared blocks.
__device__ __forceinline__ int luma_at(int row, int column) {
    return (row / 8 * 8 + column / 8) * kBlock + row % 8 * kBlockRow + column % 8;
}
__device__ __forceinline__ int chroma_at(int plane, int row, int column) {
    return (16 + plane * 4 + column / 8) * kBlock + row * kBlockRow + column % 8;
}

__device__ __forceinline__ int64_t at_most(int64_t value, int64_t most) {
    return value < most ? value : most;
}

template <class T>
__device__ __forceinline__ Rgb load_rgb(const DifferentiableJpeg& a, const void* data, int64_t sample,
                                        int64_t row, int64_t column) {
    const int64_t plane = a.height * a.width;
    const T* from = static_cast<const T*>(data) + sample * 3 * plane + row * a.width + column;
    return {to_float(from[0]), to_float(from[plane]), to_float(from[2 * plane])};
}

template <class T>
__device__ __forceinline__ void store_rgb(const DifferentiableJpeg& a, int64_t sample, int64_t row,
                                          int64_t column, Rgb value) {
    const int64_t plane = a.height * a.width;
    T* to = static_cast<T*>(a.out) + sample * 3 * plane + row * a.width + column;
    to[0] = from_float<T>(value.red);
    to[plane] = from_float<T>(value.green);
    to[2 * plane] = from_float<T>(value.blue);
}

// The pictures as blocks of luma and of averaged chroma, continued by their last row and column.
template <class T>
__device__ __forceinline__ void load_blocks(const DifferentiableJpeg& a, const Tile& t, float* blocks) {
    const int i = threadIdx.x / 32, j = threadIdx.x % 32;
    float blueness = 0, redness = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int row = 2 * i + k / 2, column = 2 * j + k % 2;
        const Rgb rgb = load_rgb<T>(a, a.images, t.sample, at_most(t.top + row, a.height - 1),
                                    at_most(t.left + column, a.width - 1));
        const Ycc c = jpeg_ycc(rgb.red, rgb.green, rgb.blue);
        blocks[luma_at(row, column)] = c.luma;
        blueness += c.blueness;
        redness += c.redness;
    }
    blocks[chroma_at(0, i, j)] = 0.25f * blueness;
    blocks[chroma_at(1, i, j)] = 0.25f * redness;
}

// Row or column `line` of a block, to registers and back.
__device__ __forceinline__ void get(const float* block, int line, int step, float (&x)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = block[line + k * step];
}
__device__ __forceinline__ void put(const float (&x)[8], float* block, int line, int step) {
#pragma unroll
    for (int k = 0; k < 8; ++k) block[line + k * step] = x[k];
}

__device__ __forceinline__ const float* table_of(const DifferentiableJpeg& a, int64_t sample, int block) {
    return a.tables + sample * 128 + (block < 16 ? 0 : 64);
}

// A thread has one line of a block at a time: 192 of them are at work.
struct Line {
    int block, line;

    __device__ __forceinline__ Line() : block(threadIdx.x / 8), line(threadIdx.x % 8) {}
    __device__ __forceinline__ bool works() const { return block < kBlocks; }
    __device__ __forceinline__ float* of(float* blocks) const { return blocks + block * kBlock; }
};

__device__ __forceinline__ void dct_rows(float* blocks, Line l) {
    float x[8];
    if (!l.works()) return;
    get(l.of(blocks), l.line * kBlockRow, 1, x);
    jpeg_dct(x);
    put(x, l.of(blocks), l.line * kBlockRow, 1);
}

template <class T>
__global__ void __launch_bounds__(kThreads) code_kernel(DifferentiableJpeg a) {
    __shared__ float blocks[kBlocks * kBlock];
    const Line l;
    each_tile(a, [&](const Tile& t) {
        load_blocks<T>(a, t, blocks);
        __syncthreads();
        dct_rows(blocks, l);
        __syncthreads();
        float x[8];
        if (l.works()) {
            const float* table = table_of(a, t.sample, l.block);
            get(l.of(blocks), l.line, kBlockRow, x);
            jpeg_dct(x);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float step = table[k * 8 + l.line];
                x[k] *= 1.0f / step;
                jpeg_round(x[k]);
                x[k] *= step;
            }
            jpeg_idct(x);
            put(x, l.of(blocks), l.line, kBlockRow);
        }
        __syncthreads();
        if (!l.works()) return;
        get(l.of(blocks), l.line * kBlockRow, 1, x);
        jpeg_idct(x);
        const bool luma = l.block < 16;
        const int64_t width = luma ? a.padded_width() : a.padded_width() / 2;
        const int64_t row = luma ? t.top + l.block / 8 * 8 + l.line : t.top / 2 + l.line;
        const int64_t column = luma ? t.left + l.block % 8 * 8 : t.left / 2 + l.block % 4 * 8;
        if (column >= width) return;
        float* to = luma ? a.luma + t.sample * a.luma_size()
                         : a.chroma + (t.sample * 2 + (l.block - 16) / 4) * a.chroma_size();
        store<float, 8>(to + row * width + column, x);
    });
}

// What was decoded at a pixel, chroma interpolated.
__device__ __forceinline__ Rgb decoded(const DifferentiableJpeg& a, int64_t sample, int64_t row,
                                       int64_t column) {
    const int64_t width = a.padded_width() / 2, i = row / 2, j = column / 2;
    const int64_t far_i = row % 2 ? at_most(i + 1, a.chroma_height() - 1) : (i > 0 ? i - 1 : 0);
    const int64_t far_j = column % 2 ? at_most(j + 1, a.chroma_width() - 1) : (j > 0 ? j - 1 : 0);
    float chroma[2];
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
        const float* from = a.chroma + (sample * 2 + plane) * a.chroma_size();
        const float *near = from + i * width, *far = from + far_i * width;
        chroma[plane] = jpeg_blend(jpeg_blend(near[j], far[j]), jpeg_blend(near[far_j], far[far_j]));
    }
    return jpeg_rgb({a.luma[sample * a.luma_size() + row * a.padded_width() + column], chroma[0], chroma[1]});
}

template <class T>
__global__ void __launch_bounds__(kThreads) decode_kernel(DifferentiableJpeg a) {
    const int64_t size = a.height * a.width;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t item = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; item < a.batch * size;
         item += hop) {
        const int64_t sample = item / size, row = item % size / a.width, column = item % a.width;
        const Rgb value = decoded(a, sample, row, column);
        store_rgb<T>(a, sample, row, column,
                     {clamp(value.red, 0, 1), clamp(value.green, 0, 1), clamp(value.blue, 0, 1)});
    }
}

// A tile with one pixel around: what reaches the tile's chroma. The ghosts beyond the picture repeat its
// first pixels, and its last ones where their number is even, as interpolation does.
constexpr int kHaloRows = kTileRows + 2, kHaloColumns = kTileColumns + 2;

template <class T>
__device__ __forceinline__ void load_gradient(const DifferentiableJpeg& a, const Tile& t, float* blocks,
                                              float* blueness, float* redness) {
    for (int k = threadIdx.x; k < kHaloRows * kHaloColumns; k += kThreads) {
        int64_t row = t.top + k / kHaloColumns - 1, column = t.left + k % kHaloColumns - 1;
        const bool own =
            row >= t.top && row < t.top + kTileRows && column >= t.left && column < t.left + kTileColumns;
        const int to = own ? luma_at(static_cast<int>(row - t.top), static_cast<int>(column - t.left)) : 0;
        Ycc g = {0, 0, 0};
        const bool inside = row < a.height && column < a.width;
        if (row < 0) row = 0;
        if (column < 0) column = 0;
        if (row == a.height && a.height % 2 == 0) row = a.height - 1;
        if (column == a.width && a.width % 2 == 0) column = a.width - 1;
        if (row < a.height && column < a.width) {
            const Rgb value = decoded(a, t.sample, row, column);
            const Rgb grad = load_rgb<T>(a, a.grad, t.sample, row, column);
            g = jpeg_rgb_adjoint({jpeg_inside(value.red, grad.red), jpeg_inside(value.green, grad.green),
                                  jpeg_inside(value.blue, grad.blue)});
        }
        if (own) blocks[to] = inside ? g.luma : 0.0f;
        blueness[k] = g.blueness;
        redness[k] = g.redness;
    }
}

// The gradient in a sample of chroma, from the 4 x 4 pixels that it was interpolated to.
__device__ __forceinline__ float gather(const float* pixels, int i, int j) {
    float along[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const float* p = pixels + (2 * i + k) * kHaloColumns + 2 * j;
        along[k] = jpeg_blend(p[1] + p[2], p[0] + p[3]);
    }
    return jpeg_blend(along[1] + along[2], along[0] + along[3]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(DifferentiableJpeg a) {
    __shared__ float coded[kBlocks * kBlock], blocks[kBlocks * kBlock];
    __shared__ float blueness[kHaloRows * kHaloColumns], redness[kHaloRows * kHaloColumns];
    const Line l;
    each_tile(a, [&](const Tile& t) {
        load_blocks<T>(a, t, coded);
        load_gradient<T>(a, t, blocks, blueness, redness);
        __syncthreads();
        const int i = threadIdx.x / 32, j = threadIdx.x % 32;
        const bool exists = t.top / 2 + i < a.chroma_height() && t.left / 2 + j < a.chroma_width();
        blocks[chroma_at(0, i, j)] = exists ? gather(blueness, i, j) : 0.0f;
        blocks[chroma_at(1, i, j)] = exists ? gather(redness, i, j) : 0.0f;
        __syncthreads();
        dct_rows(coded, l);
        dct_rows(blocks, l);
        __syncthreads();
        if (l.works()) {
            const float* table = table_of(a, t.sample, l.block);
            float x[8], g[8];
            get(l.of(coded), l.line, kBlockRow, x);
            get(l.of(blocks), l.line, kBlockRow, g);
            jpeg_dct(x);
            jpeg_dct(g);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                x[k] *= 1.0f / table[k * 8 + l.line];
                jpeg_slope(x[k]);
                g[k] *= x[k];
            }
            jpeg_idct(g);
            put(g, l.of(blocks), l.line, kBlockRow);
        }
        __syncthreads();
        if (l.works()) {
            float g[8];
            get(l.of(blocks), l.line * kBlockRow, 1, g);
            jpeg_idct(g);
            put(g, l.of(blocks), l.line * kBlockRow, 1);
        }
        __syncthreads();
        // A sample of chroma is the mean of four pixels. The last row and column were repeated: theirs is
        // the sum over all repetitions, which lie in the same macroblock.
        for (int k = 0; k < 4; ++k) {
            const int row = 2 * i + k / 2, column = 2 * j + k % 2;
            if (t.top + row >= a.height || t.left + column >= a.width) continue;
            const int last_row = t.top + row == a.height - 1 ? kTileRows - 1 : row;
            const int last_column = t.left + column == a.width - 1 ? column / 16 * 16 + 15 : column;
            Ycc sum = {0, 0, 0};
            for (int r = row; r <= last_row; ++r)
                for (int c = column; c <= last_column; ++c) {
                    sum.luma += blocks[luma_at(r, c)];
                    sum.blueness += 0.25f * blocks[chroma_at(0, r / 2, c / 2)];
                    sum.redness += 0.25f * blocks[chroma_at(1, r / 2, c / 2)];
                }
            store_rgb<T>(a, t.sample, t.top + row, t.left + column, jpeg_ycc_adjoint(sum));
        }
    });
}

unsigned tile_blocks(const DifferentiableJpeg& a) {
    const int64_t tiles = a.batch * a.strips() * ceil_div(a.padded_width(), kTileColumns), most = 1 << 14;
    return static_cast<unsigned>(tiles < most ? tiles : most);
}

}  // namespace

int differentiable_jpeg(const DifferentiableJpeg& a, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        code_kernel<T><<<tile_blocks(a), kThreads, 0, stream>>>(a);
        decode_kernel<T><<<blocks_for(a.batch * a.height * a.width), kThreads, 0, stream>>>(a);
    });
    return cudaGetLastError();
}

int differentiable_jpeg_backward(const DifferentiableJpeg& a, Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    with_type(a.dtype, [&](auto type) {
        using T = decltype(type);
        code_kernel<T><<<tile_blocks(a), kThreads, 0, stream>>>(a);
        gradient_kernel<T><<<tile_blocks(a), kThreads, 0, stream>>>(a);
    });
    return cudaGetLastError();
}

}  // namespace pumice
