#include "cpu/low_rank_edit.h"
#include "cpu/parallel.h"

namespace pumice {

namespace {
int64_t blocks(const LowRankMatrix& matrix) { return (matrix.rows + kEditRows - 1) / kEditRows; }
}  // namespace

void low_rank_edit(const LowRankEdit& a, const LowRankMatrix* matrices, int64_t count, float* workspace,
                   Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    int64_t total = 0;
    for (int64_t m = 0; m < count; ++m) total += blocks(matrices[m]);
    // Each share of the blocks of all matrices has a u of its own.
    const int64_t shares = run.threads;
    parallel_for(shares, total * kEditRows * a.columns / shares, run.threads,
                 [&](int64_t begin, int64_t end) {
                     float* u = workspace + begin * kEditRows * a.rank;
                     int64_t block = total * begin / shares, left = total * end / shares - block;
                     const LowRankMatrix* matrix = matrices;
                     for (; left && block >= blocks(*matrix); ++matrix) block -= blocks(*matrix);
                     for (; left; --left, ++block) {
                         for (; block == blocks(*matrix); ++matrix) block = 0;
                         const int64_t row = block * kEditRows,
                                       rows = std::min<int64_t>(kEditRows, matrix->rows - row);
                         PUMICE_CALL(isa, low_rank_edit, a, *matrix, row, rows, u);
                     }
                 });
}

}  // namespace pumice
