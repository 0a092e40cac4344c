#pragma once

#include "cpu/isa.h"
#include "math/pgd_step.h"

namespace pumice {

struct Run;

PUMICE_EACH_ISA(void pgd_step_linf(const PgdStep& a, int64_t sample, int64_t begin, int64_t end);
                void pgd_step_sums(const PgdStep& a, int64_t sample, int64_t begin, int64_t end,
                                   PgdSums* sums);
                void pgd_step_l2(const PgdStep& a, int64_t sample, int64_t begin, int64_t end,
                                 PgdScales scales);)

// Work is cut into chunks that depend on the size alone, so the sums, to the last bit, do not depend on the
// threads.
inline int64_t pgd_step_chunk(int64_t size) {
    const int64_t most = 1024;
    const int64_t least = 1 << 14;
    return size > most * least ? (size + most - 1) / most : least;
}
inline int64_t pgd_step_chunks(int64_t size) {
    return (size + pgd_step_chunk(size) - 1) / pgd_step_chunk(size);
}

void pgd_step_linf(const PgdStep& a, Run run);
// workspace: batch * pgd_step_chunks(size) of them
void pgd_step_l2(const PgdStep& a, PgdSums* workspace, Run run);

}  // namespace pumice
