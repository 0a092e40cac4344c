#pragma once

#include "cpu/isa.h"
#include "math/low_rank_edit.h"

namespace pumice {

struct Run;

// Rows that go together, so that what is read of D and B serves them all. They are counted from a matrix's
// first row, whatever the threads.
constexpr int kEditRows = 8;

PUMICE_EACH_ISA(
    // Rows [begin, begin + rows), at most kEditRows. u: kEditRows * a.rank floats
    void low_rank_edit(const LowRankEdit& a, const LowRankMatrix& matrix, int64_t begin, int64_t rows,
                       float* u);)

// workspace: run.threads * kEditRows * a.rank floats
void low_rank_edit(const LowRankEdit& a, const LowRankMatrix* matrices, int64_t count, float* workspace,
                   Run run);

}  // namespace pumice
