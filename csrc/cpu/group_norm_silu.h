#pragma once

#include "cpu/isa.h"
#include "math/group_norm_silu.h"

namespace pumice {

struct Run;

// channels_last keeps a few numbers for each channel on the stack (_MOST_CHANNELS_LAST in Python).
constexpr int64_t kGroupNormChannels = 4096;

struct GroupNormPartial {
    double mean, m2;
};

PUMICE_EACH_ISA(
    // (batch, channels, size): one group at a time, statistics and output while it is in the cache.
    void group_norm_silu_group(const GroupNormSilu& a, void* y, float eps, int64_t sample, int64_t group);
    void group_norm_silu_group_backward(const GroupNormSilu& a, const void* dy, void* dx, float* sums,
                                        int64_t sample, int64_t group);
    // channels_last: rows of all channels, [begin, end) of one sample.
    void group_norm_silu_rows_moments(const GroupNormSilu& a, int64_t sample, int64_t begin, int64_t end,
                                      GroupNormPartial* partial);
    void group_norm_silu_rows(const GroupNormSilu& a, void* y, int64_t sample, int64_t begin, int64_t end);
    void group_norm_silu_rows_sums(const GroupNormSilu& a, const void* dy, int64_t sample, int64_t begin,
                                   int64_t end, float* sums);
    void group_norm_silu_rows_backward(const GroupNormSilu& a, const void* dy, void* dx, const float* sums,
                                       int64_t sample, int64_t begin, int64_t end);)

// Rows that go together in channels_last; a function of the shape alone, so the bits do not depend on the
// threads.
inline int64_t group_norm_silu_rows_chunk(int64_t channels, int64_t size) {
    // Few enough that float sums along the rows stay exact, many enough to pay for a chunk's preparation.
    const int64_t least = channels > 64 ? (channels < 8192 ? 16384 / channels : 1) : 256;
    const int64_t most = (size + 1023) / 1024;
    return least > most ? least : most;
}
inline int64_t group_norm_silu_chunks(int64_t channels, int64_t size) {
    const int64_t chunk = group_norm_silu_rows_chunk(channels, size);
    return (size + chunk - 1) / chunk;
}

// workspace, channels_last only: batch * chunks * 2 * groups doubles
void group_norm_silu(const GroupNormSilu& a, void* y, float eps, double* workspace, Run run);
// sums (batch, 2, channels): of dz and of dz * normal, the bias' and weight's gradients of each sample.
// workspace, channels_last only: batch * chunks * 2 * channels floats
void group_norm_silu_backward(const GroupNormSilu& a, const void* dy, void* dx, float* sums, float* workspace,
                              Run run);

}  // namespace pumice
