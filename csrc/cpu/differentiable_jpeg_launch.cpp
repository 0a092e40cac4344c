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

// Samples from `first` on, as a batch of their own; luma and chroma are the workspace's.
template <class Body>
void each_group(const DifferentiableJpeg& a, const Body& body) {
    const int64_t most = differentiable_jpeg_group(a.height, a.width);
    const int64_t size = 3 * a.height * a.width * (a.dtype == Dtype::f32 ? 4 : 2);
    for (int64_t first = 0; first < a.batch; first += most) {
        DifferentiableJpeg group = a;
        group.batch = std::min(most, a.batch - first);
        group.out = static_cast<char*>(a.out) + first * size;
        group.images = static_cast<const char*>(a.images) + first * size;
        if (a.grad) group.grad = static_cast<const char*>(a.grad) + first * size;
        group.tables = a.tables + first * 128;
        body(group);
    }
}
}  // namespace

void differentiable_jpeg(const DifferentiableJpeg& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    each_group(a, [&](const DifferentiableJpeg& group) {
        each_strip(group, run.threads, [&](int64_t sample, int64_t strip) {
            PUMICE_CALL(isa, differentiable_jpeg_code, group, sample, strip);
        });
        each_strip(group, run.threads, [&](int64_t sample, int64_t strip) {
            PUMICE_CALL(isa, differentiable_jpeg_decode, group, sample, strip);
        });
    });
}

void differentiable_jpeg_backward(const DifferentiableJpeg& a, Run run) {
    const Isa isa = static_cast<Isa>(run.isa);
    each_group(a, [&](const DifferentiableJpeg& group) {
        each_strip(group, run.threads, [&](int64_t sample, int64_t strip) {
            PUMICE_CALL(isa, differentiable_jpeg_code, group, sample, strip);
        });
        each_strip(group, run.threads, [&](int64_t sample, int64_t strip) {
            PUMICE_CALL(isa, differentiable_jpeg_gradient, group, sample, strip);
        });
    });
}

}  // namespace pumice
