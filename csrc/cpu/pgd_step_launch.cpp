#include "cpu/parallel.h"
#include "cpu/pgd_step.h"

namespace pumice {

namespace {
template <class Body>
void each_chunk(const PgdStep& a, int threads, const Body& body) {
    const int64_t chunk = pgd_step_chunk(a.size);
    const int64_t chunks = pgd_step_chunks(a.size);
    parallel_for(a.batch * chunks, std::min(a.size, chunk), threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t begin = item % chunks * chunk;
            body(item, item / chunks, begin, std::min(a.size, begin + chunk));
        }
    });
}
}  // namespace

void pgd_step_linf(const PgdStep& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    each_chunk(a, run.threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, pgd_step_linf, a, sample, begin, end);
    });
}

void pgd_step_l2(const PgdStep& a, PgdSums* workspace, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t chunks = pgd_step_chunks(a.size);
    each_chunk(a, run.threads, [&](int64_t item, int64_t sample, int64_t begin, int64_t end) {
        PUMICE_CALL(isa, pgd_step_sums, a, sample, begin, end, workspace + item);
    });
    each_chunk(a, run.threads, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
        PgdSums total = {0, 0, 0};
        for (const PgdSums *s = workspace + sample * chunks, *last = s + chunks; s < last; ++s) {
            total.gg += s->gg;
            total.dg += s->dg;
            total.dd += s->dd;
        }
        const PgdScales scales = pgd_l2_scales(total, a.steps ? a.steps[sample] : a.step, a.eps);
        PUMICE_CALL(isa, pgd_step_l2, a, sample, begin, end, scales);
    });
}

}  // namespace pumice
