#pragma once

#include "cpu/isa.h"
#include "math/median_filter.h"

namespace pumice {

struct Run;

// Rows of one plane, filtered together.
constexpr int64_t kMedianRows = 64;

PUMICE_EACH_ISA(void median_filter_rows(const MedianFilter& a, int64_t plane, int64_t begin, int64_t end);)

void median_filter(const MedianFilter& a, Run run);

}  // namespace pumice
