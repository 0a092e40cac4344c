// The launchers: everything on the given device and stream; nothing allocates, nothing waits. Each returns a
// cudaError_t.
#pragma once

#include "math/bilateral_filter.h"
#include "math/differentiable_jpeg.h"
#include "math/group_norm_silu.h"
#include "math/guidance_step.h"
#include "math/low_rank_edit.h"
#include "math/median_filter.h"
#include "math/pgd_step.h"
#include "math/total_variation.h"

namespace pumice {

struct Run {
    int device;
    void* stream;
};

int bilateral_filter(const BilateralFilter& args, Run run);

// Chunks that a sample's sums are cut into; a workspace holds one PgdSums for each.
inline int64_t pgd_step_chunks(int64_t size) {
    const int64_t chunks = (size + 8191) / 8192;
    return chunks < 256 ? chunks : 256;
}
int pgd_step_linf(const PgdStep& args, Run run);
int pgd_step_l2(const PgdStep& args, PgdSums* workspace, Run run);

// Positions of a sample that one block sums up; a workspace holds kGuidanceSums doubles for each such chunk.
inline int64_t guidance_step_chunk(int64_t positions) {
    const int64_t least = 8192, most = (positions + 1023) / 1024 * 8;  // a multiple of any pack
    return least > most ? least : most;
}
// `sums` may be null; without args.out they are all that is computed.
int guidance_step(const GuidanceStep& args, float* sums, double* workspace, Run run);

// Elements of a channel, or channels_last rows, that are reduced together.
inline int64_t group_norm_silu_chunk(int64_t size, bool channels_last) {
    const int64_t least = channels_last ? 256 : 4096, most = (size + 1023) / 1024 * 8;
    return least > most ? least : most;
}
// Floats: three for each channel and chunk; backward two, and two for each group.
inline int64_t group_norm_silu_workspace(int64_t batch, int64_t channels, int64_t size, int64_t groups,
                                         bool last, bool backward) {
    const int64_t chunk = group_norm_silu_chunk(size, last), chunks = (size + chunk - 1) / chunk;
    return batch * channels * chunks * (backward ? 2 : 3) + (backward ? batch * groups * 2 : 0);
}
int group_norm_silu(const GroupNormSilu& args, void* y, float eps, void* workspace, Run run);
int group_norm_silu_backward(const GroupNormSilu& args, const void* dy, void* dx, float* sums,
                             void* workspace, Run run);

// Rows of a block, all of one matrix; a workspace holds W D for each of them.
constexpr int kEditRows = 32;
inline int64_t low_rank_edit_blocks(int64_t rows) { return (rows + kEditRows - 1) / kEditRows; }
int low_rank_edit(const LowRankEdit& args, const LowRankMatrix* matrices, int64_t count, float* workspace,
                  Run run);

int median_filter(const MedianFilter& args, Run run);

int differentiable_jpeg(const DifferentiableJpeg& args, Run run);
int differentiable_jpeg_backward(const DifferentiableJpeg& args, Run run);

// Two times ahead, right and down: what an iteration reads and what it writes.
inline int64_t total_variation_workspace(int64_t samples, int64_t channels, int64_t height, int64_t width) {
    return 6 * samples * channels * height * width;
}
int total_variation(const TotalVariation& args, float* workspace, Run run);

}  // namespace pumice
