// pumice._cuda: pointers, sizes and strides (in elements), a device and a stream in. Checks and allocation
// are Python's.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace pumice;
using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

static void check(int status) {
    if (status == cudaSuccess) return;
    const char* text = cudaGetErrorString(static_cast<cudaError_t>(status));
    throw std::runtime_error("CUDA error " + std::to_string(status) + ": " + text);
}

GroupNormSilu group_norm_args(Pointer x, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, int dtype,
                              int weight_dtype, int bias_dtype, int64_t batch, int64_t channels, int64_t size,
                              int64_t groups, bool channels_last) {
    return {at<void>(x),
            at<void>(weight),
            at<void>(bias),
            at<float>(mean),
            at<float>(rstd),
            static_cast<Dtype>(dtype),
            static_cast<Dtype>(weight_dtype),
            static_cast<Dtype>(bias_dtype),
            batch,
            channels,
            size,
            groups,
            channels_last};
}

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.attr("__version__") = PUMICE_VERSION;
    m.attr("architectures") = PUMICE_CUDA_ARCHITECTURES;
    m.attr("cuda_version") =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    // 0, or the CUDA error that says why no device can be used: 35 without a driver.
    m.def("probe", [] {
        int count = 0;
        return static_cast<int>(cudaGetDeviceCount(&count));
    });

    m.def(
        "bilateral_filter",
        [](Pointer out, Pointer x, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
           int size, float space, float color, int device, Pointer stream) {
            const BilateralFilter a{
                at<void>(out), at<void>(x), static_cast<Dtype>(dtype), batch, channels, height, width, size,
                space,         color};
            check(bilateral_filter(a, {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("differentiable_jpeg_workspace", differentiable_jpeg_workspace);
    // With a gradient, backwards.
    m.def(
        "differentiable_jpeg",
        [](Pointer out, Pointer images, Pointer grad, Pointer tables, int dtype, int64_t batch,
           int64_t height, int64_t width, Pointer workspace, int device, Pointer stream) {
            DifferentiableJpeg a{at<void>(out),
                                 at<void>(images),
                                 at<void>(grad),
                                 at<float>(tables),
                                 at<float>(workspace),
                                 nullptr,
                                 static_cast<Dtype>(dtype),
                                 batch,
                                 height,
                                 width};
            a.chroma = a.luma + batch * a.luma_size();
            const Run run{device, at<void>(stream)};
            check(grad ? differentiable_jpeg_backward(a, run) : differentiable_jpeg(a, run));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("guidance_step_workspace", [](int64_t batch, int64_t, int64_t positions) {
        return batch * ((positions - 1) / guidance_step_chunk(positions) + 1) * kGuidanceSums;
    });
    m.def(
        "guidance_magnitude",
        [](Pointer sums, Pointer cond, Pointer uncond, int dtype, int64_t batch, int64_t channels,
           int64_t positions, bool channels_last, int64_t cond_stride, int64_t uncond_stride,
           Pointer workspace, int device, Pointer stream) {
            GuidanceStep a{};
            a.cond = at<void>(cond);
            a.uncond = at<void>(uncond);
            a.model_dtype = static_cast<Dtype>(dtype);
            a.batch = batch;
            a.channels = channels;
            a.positions = positions;
            a.channels_last = channels_last;
            a.cond_stride = cond_stride;
            a.uncond_stride = uncond_stride;
            check(guidance_step(a, at<float>(sums), at<double>(workspace), {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "guidance_step",
        [](Pointer out, Pointer x, Pointer cond, Pointer uncond, Pointer noise, int dtype, int model_dtype,
           int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t out_stride,
           int64_t x_stride, int64_t cond_stride, int64_t uncond_stride, int64_t noise_stride, float scale,
           Pointer scales, Pointer coefficients, int64_t coefficients_stride, int prediction, float clip,
           Pointer sums, Pointer workspace, int device, Pointer stream) {
            const GuidanceStep a{at<void>(out),
                                 at<void>(x),
                                 at<void>(cond),
                                 at<void>(uncond),
                                 at<void>(noise),
                                 static_cast<Dtype>(dtype),
                                 static_cast<Dtype>(model_dtype),
                                 batch,
                                 channels,
                                 positions,
                                 channels_last,
                                 out_stride,
                                 x_stride,
                                 cond_stride,
                                 uncond_stride,
                                 noise_stride,
                                 scale,
                                 at<float>(scales),
                                 at<float>(coefficients),
                                 coefficients_stride,
                                 static_cast<Prediction>(prediction),
                                 clip};
            check(guidance_step(a, at<float>(sums), at<double>(workspace), {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("low_rank_edit_workspace", [](const std::vector<int64_t>& rows, int64_t rank, int, Pointer) {
        int64_t blocks = 0;
        for (int64_t count : rows) blocks += low_rank_edit_blocks(count);
        return blocks * kEditRows * rank;
    });
    m.def(
        "low_rank_edit",
        [](const std::vector<Pointer>& weights, const std::vector<int64_t>& rows,
           const std::vector<int64_t>& strides, int dtype, int64_t columns, int64_t rank, Pointer up,
           Pointer down, Pointer workspace, int device, Pointer stream) {
            std::vector<LowRankMatrix> matrices;
            for (size_t i = 0; i < weights.size(); ++i)
                matrices.push_back({at<void>(weights[i]), rows[i], strides[i]});
            const LowRankEdit a{static_cast<Dtype>(dtype), columns, rank, at<float>(up), at<float>(down)};
            check(low_rank_edit(a, matrices.data(), matrices.size(), at<float>(workspace),
                                {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "median_filter",
        [](Pointer out, Pointer x, int dtype, int64_t planes, int64_t height, int64_t width, int size,
           int device, Pointer stream) {
            const MedianFilter a{at<void>(out), at<void>(x), static_cast<Dtype>(dtype), planes, height,
                                 width,         size};
            check(median_filter(a, {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("pgd_step_workspace", [](int64_t batch, int64_t size) {
        return batch * pgd_step_chunks(size) * static_cast<int64_t>(sizeof(PgdSums) / sizeof(double));
    });
    m.def(
        "pgd_step",
        [](Pointer out, Pointer x, Pointer grad, Pointer x0, int grad_dtype, int64_t batch, int64_t size,
           int64_t out_stride, int64_t x_stride, int64_t grad_stride, int64_t x0_stride, float step,
           Pointer steps, float eps, float lower, float upper, Pointer l2_workspace, int device,
           Pointer stream) {
            const PgdStep a{
                at<float>(out), at<float>(x), at<void>(grad),   at<float>(x0), static_cast<Dtype>(grad_dtype),
                batch,          size,         out_stride,       x_stride,      grad_stride,
                x0_stride,      step,         at<float>(steps), eps,           lower,
                upper};
            const Run run{device, at<void>(stream)};
            check(l2_workspace ? pgd_step_l2(a, at<PgdSums>(l2_workspace), run) : pgd_step_linf(a, run));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("total_variation_workspace", total_variation_workspace);
    m.def(
        "total_variation",
        [](Pointer out, Pointer images, int64_t samples, int64_t channels, int64_t height, int64_t width,
           float weight, Pointer weights, int iterations, bool isotropic, Pointer workspace, int device,
           Pointer stream) {
            const TotalVariation a{at<float>(out), at<float>(images),  samples,    channels, height, width,
                                   weight,         at<float>(weights), iterations, isotropic};
            check(total_variation(a, at<float>(workspace), {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("group_norm_silu_workspace", [](int64_t batch, int64_t channels, int64_t size, int64_t groups,
                                          bool last) {
        return (group_norm_silu_workspace(batch, channels, size, groups, last, false) + 1) / 2;  // of float64
    });
    m.def(
        "group_norm_silu",
        [](Pointer x, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, int dtype, int weight_dtype,
           int bias_dtype, int64_t batch, int64_t channels, int64_t size, int64_t groups, bool channels_last,
           Pointer y, float eps, Pointer workspace, int device, Pointer stream) {
            const auto a = group_norm_args(x, weight, bias, mean, rstd, dtype, weight_dtype, bias_dtype,
                                           batch, channels, size, groups, channels_last);
            check(group_norm_silu(a, at<void>(y), eps, at<void>(workspace), {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("group_norm_silu_backward_workspace",
          [](int64_t batch, int64_t channels, int64_t size, int64_t groups, bool last) {
              return group_norm_silu_workspace(batch, channels, size, groups, last, true);
          });
    m.def(
        "group_norm_silu_backward",
        [](Pointer x, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, int dtype, int weight_dtype,
           int bias_dtype, int64_t batch, int64_t channels, int64_t size, int64_t groups, bool channels_last,
           Pointer dy, Pointer dx, Pointer sums, Pointer workspace, int device, Pointer stream) {
            const auto a = group_norm_args(x, weight, bias, mean, rstd, dtype, weight_dtype, bias_dtype,
                                           batch, channels, size, groups, channels_last);
            check(group_norm_silu_backward(a, at<void>(dy), at<void>(dx), at<float>(sums),
                                           at<void>(workspace), {device, at<void>(stream)}));
        },
        py::call_guard<py::gil_scoped_release>());
}
