#include <cmath>

#include "cpu/group_norm_silu.h"
#include "cpu/parallel.h"

namespace pumice {

namespace {
// body(item, sample, begin, end) over chunks of rows.
template <class Body>
void each_rows(const GroupNormSilu& a, int threads, const Body& body) {
    const int64_t chunks = group_norm_silu_chunks(a.channels, a.size),
                  chunk = group_norm_silu_rows_chunk(a.channels, a.size);
    parallel_for(a.batch * chunks, chunk * a.channels, threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t begin = item % chunks * chunk;
            body(item, item / chunks, begin, std::min(a.size, begin + chunk));
        }
    });
}

template <class Body>
void each_group(const GroupNormSilu& a, int threads, const Body& body) {
    parallel_for(a.batch * a.groups, a.per_group() * a.size, threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) body(item / a.groups, item % a.groups);
    });
}

void merge_moments(const GroupNormSilu& a, float eps, const GroupNormPartial* partial) {
    const int64_t chunks = group_norm_silu_chunks(a.channels, a.size),
                  chunk = group_norm_silu_rows_chunk(a.channels, a.size);
    for (int64_t item = 0; item < a.batch * a.groups; ++item) {
        const GroupNormPartial* from = partial + item / a.groups * chunks * a.groups + item % a.groups;
        double seen = 0, mean = 0, m2 = 0;
        for (int64_t k = 0; k < chunks; ++k) {
            const double rows = static_cast<double>(std::min(chunk, a.size - k * chunk) * a.per_group());
            const double delta = from[k * a.groups].mean - mean, share = rows / (seen + rows);
            m2 += from[k * a.groups].m2 + delta * delta * seen * share;
            mean += delta * share;
            seen += rows;
        }
        a.mean[item] = static_cast<float>(mean);
        a.rstd[item] = static_cast<float>(1 / std::sqrt(m2 / seen + eps));
    }
}

void merge_sums(const GroupNormSilu& a, const float* partial, float* sums) {
    const int64_t chunks = group_norm_silu_chunks(a.channels, a.size), width = 2 * a.channels;
    for (int64_t sample = 0; sample < a.batch; ++sample)
        for (int64_t c = 0; c < width; ++c) {
            double total = 0;
            for (int64_t k = 0; k < chunks; ++k) total += partial[(sample * chunks + k) * width + c];
            sums[sample * width + c] = static_cast<float>(total);
        }
}
}  // namespace

void group_norm_silu(const GroupNormSilu& a, void* y, float eps, double* workspace, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    if (!a.channels_last) {
        each_group(a, run.threads, [&](int64_t sample, int64_t group) {
            PUMICE_CALL(isa, group_norm_silu_group, a, y, eps, sample, group);
        });
        return;
    }
    auto* partial = reinterpret_cast<GroupNormPartial*>(workspace);
    each_rows(a, run.threads, [&](int64_t item, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, group_norm_silu_rows_moments, a, sample, begin, end, partial + item * a.groups);
    });
    merge_moments(a, eps, partial);
    each_rows(a, run.threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, group_norm_silu_rows, a, y, sample, begin, end);
    });
}

void group_norm_silu_backward(const GroupNormSilu& a, const void* dy, void* dx, float* sums, float* workspace,
                              Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    if (!a.channels_last) {
        each_group(a, run.threads, [&](int64_t sample, int64_t group) {
            PUMICE_CALL(isa, group_norm_silu_group_backward, a, dy, dx, sums, sample, group);
        });
        return;
    }
    const int64_t width = 2 * a.channels;
    each_rows(a, run.threads, [&](int64_t item, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, group_norm_silu_rows_sums, a, dy, sample, begin, end, workspace + item * width);
    });
    merge_sums(a, workspace, sums);
    each_rows(a, run.threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, group_norm_silu_rows_backward, a, dy, dx, sums + sample * width, sample, begin, end);
    });
}

}  // namespace pumice
