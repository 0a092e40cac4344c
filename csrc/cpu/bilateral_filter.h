#pragma once

#include "cpu/isa.h"
#include "math/bilateral_filter.h"

namespace pumice {

struct Run;

// Rows of one picture, filtered together.
constexpr int64_t kBilateralRows = 64;

PUMICE_EACH_ISA(void bilateral_filter_rows(const BilateralFilter& a, int64_t picture, int64_t begin,
                                           int64_t end);)

void bilateral_filter(const BilateralFilter& a, Run run);

}  // namespace pumice
