#pragma once

#include "cpu/isa.h"
#include "math/differentiable_jpeg.h"

namespace pumice {

struct Run;

// Each works on one strip of 16 rows of one sample: `code` from the pictures to decoded luma and chroma, the
// others, which look at the chroma of neighbouring strips, from there to the pictures or to the gradient.
PUMICE_EACH_ISA(void differentiable_jpeg_code(const DifferentiableJpeg& a, int64_t sample, int64_t strip);
                void differentiable_jpeg_decode(const DifferentiableJpeg& a, int64_t sample, int64_t strip);
                void differentiable_jpeg_gradient(const DifferentiableJpeg& a, int64_t sample,
                                                  int64_t strip);)

// As many samples go together as keep what is decoded in the cache, from one step to the next; it is all that
// the workspace holds.
inline int64_t differentiable_jpeg_group(int64_t height, int64_t width) {
    const int64_t pixels = 1 << 19, padded = (height + 15) / 16 * ((width + 15) / 16) * 256;
    return padded < pixels ? pixels / padded : 1;
}

void differentiable_jpeg(const DifferentiableJpeg& a, Run run);
void differentiable_jpeg_backward(const DifferentiableJpeg& a, Run run);

}  // namespace pumice
