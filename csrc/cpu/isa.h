// Which instruction level runs. Every kernel file of this folder is compiled once per level, with PUMICE_ISA
// as the namespace; the choice is made at run time, per call.
#pragma once

#include <stdint.h>

#include "math/common.h"

namespace pumice {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();

}  // namespace pumice

#if defined(__x86_64__)
#define PUMICE_EACH_ISA(declaration) \
    namespace isa_default {          \
    declaration                      \
    }                                \
    namespace isa_avx2 {             \
    declaration                      \
    }                                \
    namespace isa_avx512 {           \
    declaration                      \
    }
#define PUMICE_CALL(isa, function, ...)         \
    switch (isa) {                              \
        case Isa::avx512:                       \
            isa_avx512::function(__VA_ARGS__);  \
            break;                              \
        case Isa::avx2:                         \
            isa_avx2::function(__VA_ARGS__);    \
            break;                              \
        default:                                \
            isa_default::function(__VA_ARGS__); \
    }
#else
#define PUMICE_EACH_ISA(declaration) \
    namespace isa_default {          \
    declaration                      \
    }
#define PUMICE_CALL(isa, function, ...) isa_default::function(__VA_ARGS__)
#endif
