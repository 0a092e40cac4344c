#include "cpu/parallel.h"
#include "cpu/total_variation.h"

namespace pumice {

void total_variation(const TotalVariation& a, float* workspace, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t work = a.height * a.width * std::max(1, a.iterations);
    parallel_for(a.samples * a.channels, work, run.threads, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
            PUMICE_CALL(isa, total_variation_begin, a, workspace, plane);
            TvSteps steps;
            TvStep together[kTvTogether];
            for (int done = 0; done < a.iterations;) {
                const int count = std::min(kTvTogether, a.iterations - done);
                for (int k = 0; k < count; ++k) together[k] = steps.next();
                PUMICE_CALL(isa, total_variation_sweep, a, workspace, plane, together, count);
                done += count;
            }
        }
    });
}

}  // namespace pumice
