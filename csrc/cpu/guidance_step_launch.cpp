#include "cpu/guidance_step.h"
#include "cpu/parallel.h"

namespace pumice {

void guidance_step(const GuidanceStep& a, float* sums, double* workspace, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t chunk = guidance_step_chunk(a.positions), chunks = guidance_step_chunks(a.positions);
    const int64_t work = std::min(a.positions, chunk) * a.channels;
    parallel_for(a.batch * chunks, work, run.threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t begin = item % chunks * chunk, end = std::min(a.positions, begin + chunk);
            double* partial = sums ? workspace + item * kGuidanceSums : nullptr;
            PUMICE_CALL(isa, guidance_step, a, item / chunks, begin, end, partial);
        }
    });
    for (int64_t i = 0; sums && i < a.batch * kGuidanceSums; ++i) {
        double total = 0;
        for (int64_t k = 0; k < chunks; ++k)
            total += workspace[(i / kGuidanceSums * chunks + k) * kGuidanceSums + i % kGuidanceSums];
        sums[i] = static_cast<float>(total);
    }
}

}  // namespace pumice
