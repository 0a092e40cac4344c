// Vectors as wide as the instruction level has them, for kernels that hold many values in registers at once.
// Operators work element by element; a comparison chooses with ?: .
#pragma once

#include <stdint.h>
#include <string.h>

#include "math/common.h"

namespace pumice {
namespace PUMICE_ISA {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<int16_t> {
    typedef int16_t Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int32_t> {
    typedef int32_t Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
PUMICE_INLINE void load(Vector<T>& to, const T* from) {
    memcpy(&to, from, sizeof to);
}

template <class T>
PUMICE_INLINE void store(T* to, const Vector<T>& from) {
    memcpy(to, &from, sizeof from);
}

}  // namespace PUMICE_ISA
}  // namespace pumice
