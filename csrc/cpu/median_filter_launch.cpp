#include "cpu/median_filter.h"
#include "cpu/parallel.h"

namespace pumice {

void median_filter(const MedianFilter& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    const int64_t strips = (a.height + kMedianRows - 1) / kMedianRows;
    const int64_t work = std::min(a.height, kMedianRows) * a.width * a.size;  // in the cost of a copied pixel
    parallel_for(a.planes * strips, work, run.threads, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
            const int64_t begin = item % strips * kMedianRows;
            PUMICE_CALL(isa, median_filter_rows, a, item / strips, begin,
                        std::min(a.height, begin + kMedianRows));
        }
    });
}

}  // namespace pumice
