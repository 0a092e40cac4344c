#include "cpu/differentiable_jpeg.h"
#include "cpu/parallel.h"

namespace pumice {

namespace {
template <class Body>
void each_strip(const DifferentiableJpeg& a, int threads, const Body& body) {
    const int64_t strips = a.strips();
    parallel_for(a.batch * strips, 48 * a.width, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) body(item / strips, item % strips);
    });
}
}  // namespace

void differentiable_jpeg(const DifferentiableJpeg& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    each_strip(a, run.threads, [&](int64_t sample, int64_t strip) {
        PUMICE_CALL(isa, differentiable_jpeg_code, a, sample, strip);
    });
    each_strip(a, run.threads, [&](int64_t sample, int64_t strip) {
        PUMICE_CALL(isa, differentiable_jpeg_decode, a, sample, strip);
    });
}

void differentiable_jpeg_backward(const DifferentiableJpeg& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    each_strip(a, run.threads, [&](int64_t sample, int64_t strip) {
        PUMICE_CALL(isa, differentiable_jpeg_code, a, sample, strip);
    });
    each_strip(a, run.threads, [&](int64_t sample, int64_t strip) {
        PUMICE_CALL(isa, differentiable_jpeg_gradient, a, sample, strip);
    });
}

}  // namespace pumice
