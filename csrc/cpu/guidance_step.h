#pragma once

#include "cpu/isa.h"
#include "math/guidance_step.h"

namespace pumice {

struct Run;

PUMICE_EACH_ISA(
    // The new sample where a.out is given, the four sums where `sums` is, for positions [begin, end).
    void guidance_step(const GuidanceStep& a, int64_t sample, int64_t begin, int64_t end, double* sums);)

// Positions that go together; a function of the shape alone, so the bits do not depend on the threads.
inline int64_t guidance_step_chunk(int64_t positions) {
    const int64_t least = 4096, most = (positions + 1023) / 1024;
    return least > most ? least : most;
}
inline int64_t guidance_step_chunks(int64_t positions) {
    return (positions + guidance_step_chunk(positions) - 1) / guidance_step_chunk(positions);
}

// sums (batch, 4), or null; workspace with it: batch * chunks * 4 doubles
void guidance_step(const GuidanceStep& a, float* sums, double* workspace, Run run);

}  // namespace pumice
