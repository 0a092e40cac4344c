#include "cpu/bilateral_filter.h"
#include "cpu/parallel.h"

namespace pumice {

void bilateral_filter(const BilateralFilter& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t strips = (a.height + kBilateralRows - 1) / kBilateralRows;
    // A neighbour costs about as much as a copied element.
    const int64_t work = std::min(a.height, kBilateralRows) * a.width * a.size * a.size;
    parallel_for(a.batch * strips, work, run.threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t begin = item % strips * kBilateralRows;
            PUMICE_CALL(isa, bilateral_filter_rows, a, item / strips, begin,
                        std::min(a.height, begin + kBilateralRows));
        }
    });
}

}  // namespace pumice
