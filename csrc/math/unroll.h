// PUMICE_UNROLL before a loop of few turns: what it indexes is then held in registers.
#pragma once

#if defined(__CUDACC__)
#define PUMICE_UNROLL _Pragma("unroll")
#else
#define PUMICE_UNROLL _Pragma("GCC unroll 16")
#endif
