#include "cpu/parallel.h"
#include "cpu/separable_sum.h"

namespace pumice {

void separable_sum(const SeparableSum& a, float* workspace, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t strips = (a.rows.count + kSumRows - 1) / kSumRows, items = a.planes * strips;
    // In the cost of a copied element, of which a term is a small part.
    const int64_t work =
        items * kSumRows * (a.width * (4 + a.rows.terms) + a.columns.count * (4 + a.columns.terms)) / 16;
    // Each share of the strips of all planes has a workspace of its own.
    const int64_t shares = run.threads;
    parallel_for(shares, work / shares, run.threads, [&](int64_t first, int64_t last) {
        float* strip = workspace + first * a.width * kSumRows;
        for (int64_t item = items * first / shares; item < items * last / shares; ++item) {
            const int64_t begin = item % strips * kSumRows;
            PUMICE_CALL(isa, separable_sum_rows, a, item / strips, begin,
                        std::min(a.rows.count, begin + kSumRows), strip);
        }
    });
}

}  // namespace pumice
