#include "cpu/guidance_step.h"

#include "cpu/tile.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

// Eight runs are in the first-level cache at once: short ones, and none a multiple of 4096 bytes from
// another, which the processor would take for the same address.
constexpr int64_t kRun = 256;
constexpr int64_t kSpaced = kTile + 32;

struct Sample {
    const GuidanceStep& a;
    int64_t index;
    float scale = 0;
    StepCoefficients c = {};
    PredictionMap map = {};
    float cond_buffer[kSpaced], uncond_buffer[kSpaced], x_buffer[kSpaced], noise_buffer[kSpaced],
        out_buffer[kSpaced];

    Sample(const GuidanceStep& args, int64_t sample) : a(args), index(sample) {
        if (!a.out) return;
        scale = a.scales ? a.scales[sample] : a.scale;
        c = step_coefficients(a, sample);
        map = prediction_map(a.prediction, c.alpha, c.sigma);
    }

    const float* cond(int64_t at, int64_t n) {
        return load_run(a.cond, a.model_dtype, index * a.cond_stride + at, n, cond_buffer);
    }
    const float* uncond(int64_t at, int64_t n) {
        return load_run(a.uncond, a.model_dtype, index * a.uncond_stride + at, n, uncond_buffer);
    }

    // The update of a run whose predictions have been loaded.
    void step(int64_t at, int64_t n, const float* cond, const float* uncond) {
        const float* x = load_run(a.x, a.dtype, index * a.x_stride + at, n, x_buffer);
        float* out = open_run(a.out, a.dtype, index * a.out_stride + at, out_buffer);
        const StepCoefficients k = c;
        const PredictionMap m = map;
        const float s = scale, clip = a.clip;
        if (a.noise) {
            const float* noise = load_run(a.noise, a.dtype, index * a.noise_stride + at, n, noise_buffer);
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                out[i] = pumice::guidance_step(x[i], cond[i], uncond[i], noise[i], s, m, k, clip);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                out[i] = pumice::guidance_step(x[i], cond[i], uncond[i], 0.0f, s, m, k, clip);
        }
        store_run(a.out, a.dtype, index * a.out_stride + at, n, out_buffer);
    }
};

void add_positions(const float* dd, const float* uu, const float* du, int64_t n, double* sums) {
    float total_dd = 0, total_uu = 0, total_du = 0, cosines = 0;
#pragma omp simd reduction(+ : total_dd, total_uu, total_du, cosines)
    for (int64_t p = 0; p < n; ++p) {
        total_dd += dd[p];
        total_uu += uu[p];
        total_du += du[p];
        cosines += guidance_cosine({dd[p], uu[p], du[p]});
    }
    sums[0] += total_dd;
    sums[1] += total_uu;
    sums[2] += total_du;
    sums[3] += cosines;
}

}  // namespace

void guidance_step(const GuidanceStep& a, int64_t sample, int64_t begin, int64_t end, double* sums) {
    Sample s(a, sample);
    float dd[kSpaced], uu[kSpaced], du[kSpaced];
    if (sums) sums[0] = sums[1] = sums[2] = sums[3] = 0;
    const int64_t hop = a.channels_last ? kTile / a.channels : kRun;
    for (int64_t first = begin; first < end; first += hop) {
        const int64_t positions = end - first < hop ? end - first : hop;
        if (a.channels_last) {
            const int64_t at = first * a.channels, n = positions * a.channels;
            const float *cond = s.cond(at, n), *uncond = s.uncond(at, n);
            for (int64_t p = 0; sums && p < positions; ++p) {
                PositionSums t = {0, 0, 0};
                for (int64_t i = p * a.channels; i < (p + 1) * a.channels; ++i) {
                    const float u = uncond[i], d = cond[i] - u;
                    t = {t.dd + d * d, t.uu + u * u, t.du + d * u};
                }
                dd[p] = t.dd;
                uu[p] = t.uu;
                du[p] = t.du;
            }
            if (a.out) s.step(at, n, cond, uncond);
        } else {
            for (int64_t p = 0; sums && p < positions; ++p) dd[p] = uu[p] = du[p] = 0;
            for (int64_t c = 0; c < a.channels; ++c) {
                const int64_t at = c * a.positions + first;
                const float *cond = s.cond(at, positions), *uncond = s.uncond(at, positions);
                if (sums) {
#pragma omp simd
                    for (int64_t p = 0; p < positions; ++p) {
                        const float u = uncond[p], d = cond[p] - u;
                        dd[p] += d * d;
                        uu[p] += u * u;
                        du[p] += d * u;
                    }
                }
                if (a.out) s.step(at, positions, cond, uncond);
            }
        }
        if (sums) add_positions(dd, uu, du, positions, sums);
    }
}

}  // namespace PUMICE_ISA
}  // namespace pumice
