#include "cpu/group_norm_silu.h"

#include "cpu/tile.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Four sums at once: a single one would wait for its own additions.
inline float run_sum(const float* x, int64_t n) {
    const int64_t q = n / 4;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < q; ++i) {
        s0 += x[i];
        s1 += x[q + i];
        s2 += x[2 * q + i];
        s3 += x[3 * q + i];
    }
    for (int64_t i = 4 * q; i < n; ++i) s0 += x[i];
    return (s0 + s1) + (s2 + s3);
}

inline float run_squares(const float* x, int64_t n, float mean) {
    const int64_t q = n / 4;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < q; ++i) {
        s0 += (x[i] - mean) * (x[i] - mean);
        s1 += (x[q + i] - mean) * (x[q + i] - mean);
        s2 += (x[2 * q + i] - mean) * (x[2 * q + i] - mean);
        s3 += (x[3 * q + i] - mean) * (x[3 * q + i] - mean);
    }
    for (int64_t i = 4 * q; i < n; ++i) s0 += (x[i] - mean) * (x[i] - mean);
    return (s0 + s1) + (s2 + s3);
}

// What a channel needs, one array each, for kernels that go along the channels.
struct Channels {
    float mean[kGroupNormChannels], rstd[kGroupNormChannels], weight[kGroupNormChannels],
        bias[kGroupNormChannels];

    Channels(const GroupNormSilu& a, int64_t sample) {
        for (int64_t c = 0; c < a.channels; ++c) {
            const int64_t group = sample * a.groups + c / a.per_group();
            mean[c] = a.mean[group];
            rstd[c] = a.rstd[group];
            weight[c] = load_one(a.weight, a.weight_dtype, c);
            bias[c] = load_one(a.bias, a.bias_dtype, c);
        }
    }
};

}  // namespace

void group_norm_silu_group(const GroupNormSilu& a, void* y, float eps, int64_t sample, int64_t group) {
    const int64_t per_group = a.per_group(), count = per_group * a.size;
    const int64_t base = (sample * a.groups + group) * count;
    float buffer[kTile], result[kTile];

    double mean = 0, m2 = 0;
    for (int64_t i = 0; i < count; i += kTile) {
        const int64_t n = least(kTile, count - i);
        const float* x = load_run(a.x, a.dtype, base + i, n, buffer);
        const float run_mean = run_sum(x, n) / static_cast<float>(n);
        const double delta = run_mean - mean, share = static_cast<double>(n) / static_cast<double>(i + n);
        m2 += run_squares(x, n, run_mean) + delta * delta * static_cast<double>(i) * share;
        mean += delta * share;
    }
    const double rstd = 1 / sqrt(m2 / static_cast<double>(count) + eps);
    a.mean[sample * a.groups + group] = static_cast<float>(mean);
    a.rstd[sample * a.groups + group] = static_cast<float>(rstd);

    for (int64_t k = 0; k < per_group; ++k) {
        const int64_t c = group * per_group + k;
        // Not x * scale + (bias - mean * scale): that loses digits where the mean is large.
        const float scale = static_cast<float>(load_one(a.weight, a.weight_dtype, c) * rstd);
        const float middle = static_cast<float>(mean), bias = load_one(a.bias, a.bias_dtype, c);
        for (int64_t i = 0; i < a.size; i += kTile) {
            const int64_t n = least(kTile, a.size - i), at = base + k * a.size + i;
            const float* x = load_run(a.x, a.dtype, at, n, buffer);
            float* out = open_run(y, a.dtype, at, result);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] = silu((x[j] - middle) * scale + bias);
            store_run(y, a.dtype, at, n, result);
        }
    }
}

void group_norm_silu_group_backward(const GroupNormSilu& a, const void* dy, void* dx, float* sums,
                                    int64_t sample, int64_t group) {
    const int64_t per_group = a.per_group(), count = per_group * a.size;
    const int64_t base = (sample * a.groups + group) * count;
    const float mean = a.mean[sample * a.groups + group], rstd = a.rstd[sample * a.groups + group];
    float x_buffer[kTile], dy_buffer[kTile], result[kTile];

    double sum_dz = 0, sum_dzn = 0;
    for (int64_t k = 0; k < per_group; ++k) {
        const int64_t c = group * per_group + k;
        const float weight = load_one(a.weight, a.weight_dtype, c), bias = load_one(a.bias, a.bias_dtype, c);
        double channel_dz = 0, channel_dzn = 0;
        for (int64_t i = 0; i < a.size; i += kTile) {
            const int64_t n = least(kTile, a.size - i), at = base + k * a.size + i;
            const float* x = load_run(a.x, a.dtype, at, n, x_buffer);
            const float* g = load_run(dy, a.dtype, at, n, dy_buffer);
            float dz = 0, dzn = 0;
#pragma omp simd reduction(+ : dz, dzn)
            for (int64_t j = 0; j < n; ++j) {
                const GroupNormGrad grad = group_norm_grad(x[j], g[j], mean, rstd, weight, bias);
                dz += grad.dz;
                dzn += grad.dz * grad.normal;
            }
            channel_dz += dz;
            channel_dzn += dzn;
        }
        sums[sample * 2 * a.channels + c] = static_cast<float>(channel_dz);
        sums[(sample * 2 + 1) * a.channels + c] = static_cast<float>(channel_dzn);
        sum_dz += weight * channel_dz;
        sum_dzn += weight * channel_dzn;
    }

    const float mean_dz = static_cast<float>(sum_dz / static_cast<double>(count));
    const float mean_dzn = static_cast<float>(sum_dzn / static_cast<double>(count));
    for (int64_t k = 0; k < per_group; ++k) {
        const int64_t c = group * per_group + k;
        const float weight = load_one(a.weight, a.weight_dtype, c), bias = load_one(a.bias, a.bias_dtype, c);
        for (int64_t i = 0; i < a.size; i += kTile) {
            const int64_t n = least(kTile, a.size - i), at = base + k * a.size + i;
            const float* x = load_run(a.x, a.dtype, at, n, x_buffer);
            const float* g = load_run(dy, a.dtype, at, n, dy_buffer);
            float* out = open_run(dx, a.dtype, at, result);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j)
                out[j] = group_norm_dx(group_norm_grad(x[j], g[j], mean, rstd, weight, bias), rstd, weight,
                                       mean_dz, mean_dzn);
            store_run(dx, a.dtype, at, n, result);
        }
    }
}

void group_norm_silu_rows_moments(const GroupNormSilu& a, int64_t sample, int64_t begin, int64_t end,
                                  GroupNormPartial* partial) {
    const int64_t channels = a.channels, per_group = a.per_group();
    const double count = static_cast<double>((end - begin) * per_group);
    float buffer[kTile], sum[kGroupNormChannels], mean[kGroupNormChannels];

    for (int64_t c = 0; c < channels; ++c) sum[c] = mean[c] = 0;
    for (int pass = 0; pass < 2; ++pass) {  // the means, then the squares around them, from the cache
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t c = 0; c < channels; c += kTile) {
                const int64_t n = least(kTile, channels - c);
                const float* x = load_run(a.x, a.dtype, (sample * a.size + row) * channels + c, n, buffer);
                float* to = sum + c;
                const float* from = mean + c;
                if (pass == 0) {
#pragma omp simd
                    for (int64_t j = 0; j < n; ++j) to[j] += x[j];
                } else {
#pragma omp simd
                    for (int64_t j = 0; j < n; ++j) to[j] += (x[j] - from[j]) * (x[j] - from[j]);
                }
            }
        }
        for (int64_t group = 0; group < a.groups; ++group) {
            double total = 0;
            for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) total += sum[c];
            if (pass == 0) {
                partial[group].mean = static_cast<float>(total / count);
                for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
                    mean[c] = static_cast<float>(partial[group].mean);
                    sum[c] = 0;
                }
            } else {
                partial[group].m2 = total;
            }
        }
    }
}

void group_norm_silu_rows(const GroupNormSilu& a, void* y, int64_t sample, int64_t begin, int64_t end) {
    const Channels per(a, sample);
    float buffer[kTile], result[kTile];
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < a.channels; c += kTile) {
            const int64_t n = least(kTile, a.channels - c), at = (sample * a.size + row) * a.channels + c;
            const float* x = load_run(a.x, a.dtype, at, n, buffer);
            const float *mean = per.mean + c, *rstd = per.rstd + c, *weight = per.weight + c,
                        *bias = per.bias + c;
            float* out = open_run(y, a.dtype, at, result);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) out[j] = silu((x[j] - mean[j]) * rstd[j] * weight[j] + bias[j]);
            store_run(y, a.dtype, at, n, result);
        }
    }
}

void group_norm_silu_rows_sums(const GroupNormSilu& a, const void* dy, int64_t sample, int64_t begin,
                               int64_t end, float* sums) {
    const Channels per(a, sample);
    float x_buffer[kTile], dy_buffer[kTile];
    for (int64_t c = 0; c < 2 * a.channels; ++c) sums[c] = 0;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < a.channels; c += kTile) {
            const int64_t n = least(kTile, a.channels - c), at = (sample * a.size + row) * a.channels + c;
            const float* x = load_run(a.x, a.dtype, at, n, x_buffer);
            const float* g = load_run(dy, a.dtype, at, n, dy_buffer);
            const float *mean = per.mean + c, *rstd = per.rstd + c, *weight = per.weight + c,
                        *bias = per.bias + c;
            float *dz = sums + c, *dzn = sums + a.channels + c;
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
                const GroupNormGrad grad = group_norm_grad(x[j], g[j], mean[j], rstd[j], weight[j], bias[j]);
                dz[j] += grad.dz;
                dzn[j] += grad.dz * grad.normal;
            }
        }
    }
}

void group_norm_silu_rows_backward(const GroupNormSilu& a, const void* dy, void* dx, const float* sums,
                                   int64_t sample, int64_t begin, int64_t end) {
    const Channels per(a, sample);
    const int64_t per_group = a.per_group();
    const double count = static_cast<double>(per_group * a.size);
    float x_buffer[kTile], dy_buffer[kTile], result[kTile];
    float mean_dz[kGroupNormChannels], mean_dzn[kGroupNormChannels];
    for (int64_t first = 0; first < a.channels; first += per_group) {
        double dz = 0, dzn = 0;
        for (int64_t c = first; c < first + per_group; ++c) {
            dz += static_cast<double>(per.weight[c]) * sums[c];
            dzn += static_cast<double>(per.weight[c]) * sums[a.channels + c];
        }
        for (int64_t c = first; c < first + per_group; ++c) {
            mean_dz[c] = static_cast<float>(dz / count);
            mean_dzn[c] = static_cast<float>(dzn / count);
        }
    }
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < a.channels; c += kTile) {
            const int64_t n = least(kTile, a.channels - c), at = (sample * a.size + row) * a.channels + c;
            const float* x = load_run(a.x, a.dtype, at, n, x_buffer);
            const float* g = load_run(dy, a.dtype, at, n, dy_buffer);
            const float *mean = per.mean + c, *rstd = per.rstd + c, *weight = per.weight + c,
                        *bias = per.bias + c;
            const float *dz = mean_dz + c, *dzn = mean_dzn + c;
            float* out = open_run(dx, a.dtype, at, result);
#pragma omp simd
            for (int64_t j = 0; j < n; ++j)
                out[j] = group_norm_dx(group_norm_grad(x[j], g[j], mean[j], rstd[j], weight[j], bias[j]),
                                       rstd[j], weight[j], dz[j], dzn[j]);
            store_run(dx, a.dtype, at, n, result);
        }
    }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
