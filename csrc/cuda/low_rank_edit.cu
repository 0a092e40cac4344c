// All matrices in one launch: their table travels by value with the launch, so nothing is copied to the
// device first and a graph can hold it. A warp owns a few rows and takes both steps for them; what it reads a
// second time is still in the caches.
#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace pumice {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRows = kEditRows / kWarps;  // of a warp
constexpr int kMatrices = 144;  // of a launch: what its 4 KiB of parameters hold, and all 140 of SDXL

struct Table {
    LowRankEdit edit;
    int count;
    int first[kMatrices];  // the block that a matrix begins with
    LowRankMatrix matrices[kMatrices];
};
static_assert(sizeof(Table) + sizeof(float*) <= 4096, "beyond what every driver takes");

// The rows of a warp. Past the last row they repeat it; what they give then is not written.
template <class T>
struct Rows {
    T* data[kRows];
    int count;
};

// u[k] = the dot products of the rows with RANKS rows of D transposed, summed in a fixed order.
template <class T, int V, int RANKS>
__device__ __forceinline__ void project(const Rows<T>& rows, const float* up, int64_t columns, float* u) {
    float sums[kRows][RANKS] = {};
    const int lane = threadIdx.x % 32;
    for (int64_t j = lane * V; j < columns; j += 32 * V) {
        float w[kRows][V], d[RANKS][V];
#pragma unroll
        for (int i = 0; i < kRows; ++i) load<T, V>(rows.data[i] + j, w[i]);
#pragma unroll
        for (int k = 0; k < RANKS; ++k) load<float, V>(up + k * columns + j, d[k]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float w_column[kRows], d_column[RANKS];
#pragma unroll
            for (int i = 0; i < kRows; ++i) w_column[i] = w[i][v];
#pragma unroll
            for (int k = 0; k < RANKS; ++k) d_column[k] = d[k][v];
            low_rank_project(w_column, d_column, sums);
        }
    }
#pragma unroll
    for (int k = 0; k < RANKS; ++k)
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const float total = warp_sum(sums[i][k]);
            if (lane == 0) u[k * kRows + i] = total;
        }
}

// Two blocks a multiprocessor, so that enough loads are under way at once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    edit_kernel(const __grid_constant__ Table table, float* workspace) {
    const LowRankEdit& a = table.edit;
    int m = 0;  // the last matrix that begins at this block or before
    for (int end = table.count; end - m > 1;) {
        const int middle = (m + end) / 2;
        if (table.first[middle] <= static_cast<int>(blockIdx.x))
            m = middle;
        else
            end = middle;
    }
    const LowRankMatrix matrix = table.matrices[m];
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int64_t row = (warp - static_cast<int64_t>(table.first[m]) * kWarps) * kRows;
    if (row >= matrix.rows) return;
    Rows<T> rows;
    rows.count = matrix.rows - row < kRows ? static_cast<int>(matrix.rows - row) : kRows;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
        rows.data[i] = static_cast<T*>(matrix.data) + (row + min(i, rows.count - 1)) * matrix.stride;

    float* u = workspace + warp * kRows * a.rank;
    int64_t k = 0;
    for (; k + 4 <= a.rank; k += 4) project<T, V, 4>(rows, a.up + k * a.columns, a.columns, u + k * kRows);
    for (; k < a.rank; ++k) project<T, V, 1>(rows, a.up + k * a.columns, a.columns, u + k * kRows);
    __syncwarp();  // lane 0 wrote u

    for (int64_t j = threadIdx.x % 32 * V; j < a.columns; j += 32 * V) {
        float delta[V][kRows] = {};
        for (k = 0; k < a.rank; ++k) {
            float of_rank[kRows], down[V];
            load<float, kRows>(u + k * kRows, of_rank);
            load<float, V>(a.down + k * a.columns + j, down);
#pragma unroll
            for (int v = 0; v < V; ++v) low_rank_expand(of_rank, down[v], delta[v]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (i >= rows.count) break;
            float w[V];
            load<T, V>(rows.data[i] + j, w);
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] += delta[v][i];
            store<T, V>(rows.data[i] + j, w);
        }
    }
}

// Calls function(T(), V): the storage type, and how many columns go at a time.
template <class Function>
void specialize(const Table& table, const Function& function) {
    const LowRankEdit& a = table.edit;
    with_type(a.dtype, [&](auto type) {
        constexpr int kWide = 16 / sizeof(type);
        bool wide = vectors<kWide>(a.up, 4, a.columns) && vectors<kWide>(a.down, 4, a.columns);
        for (int m = 0; m < table.count; ++m) {
            const LowRankMatrix& matrix = table.matrices[m];
            wide = wide && vectors<kWide>(matrix.data, sizeof(type), matrix.rows > 1 ? matrix.stride : 0);
        }
        if (wide)
            function(type, std::integral_constant<int, kWide>());
        else
            function(type, std::integral_constant<int, 1>());
    });
}

}  // namespace

int low_rank_edit(const LowRankEdit& a, const LowRankMatrix* matrices, int64_t count, float* workspace,
                  Run run) {
    const DeviceGuard guard(run.device);
    const auto stream = static_cast<cudaStream_t>(run.stream);
    for (int64_t begin = 0; begin < count; begin += kMatrices) {
        Table table{};
        table.edit = a;
        table.count = static_cast<int>(count - begin < kMatrices ? count - begin : kMatrices);
        int64_t blocks = 0;
        for (int m = 0; m < table.count; ++m) {
            table.matrices[m] = matrices[begin + m];
            table.first[m] = static_cast<int>(blocks);
            blocks += low_rank_edit_blocks(table.matrices[m].rows);
        }
        specialize(table, [&](auto type, auto wide) {
            edit_kernel<decltype(type), wide>
                <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, workspace);
        });
    }
    return cudaGetLastError();
}

}  // namespace pumice
