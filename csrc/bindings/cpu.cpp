// pumice._cpu: pointers, sizes and strides (in elements) in, numbers out. Checks and allocation are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cpu/bilateral_filter.h"
#include "cpu/differentiable_jpeg.h"
#include "cpu/group_norm_silu.h"
#include "cpu/guidance_step.h"
#include "cpu/isa.h"
#include "cpu/low_rank_edit.h"
#include "cpu/median_filter.h"
#include "cpu/parallel.h"
#include "cpu/pgd_step.h"
#include "cpu/separable_sum.h"
#include "cpu/total_variation.h"

namespace py = pybind11;
using namespace pumice;
using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
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

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
    m.attr("__version__") = PUMICE_VERSION;
    m.def("best_isa", [] { return static_cast<int>(best_isa()); });

    m.def(
        "bilateral_filter",
        [](Pointer out, Pointer x, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
           int size, float space, float color, int threads, int isa) {
            const BilateralFilter a{
                at<void>(out), at<void>(x), static_cast<Dtype>(dtype), batch, channels, height, width, size,
                space,         color};
            bilateral_filter(a, {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("differentiable_jpeg_workspace", [](int64_t batch, int64_t height, int64_t width) {
        const int64_t together = std::min(batch, differentiable_jpeg_group(height, width));
        return differentiable_jpeg_workspace(together, height, width);
    });
    // With a gradient, backwards.
    m.def(
        "differentiable_jpeg",
        [](Pointer out, Pointer images, Pointer grad, Pointer tables, int dtype, int64_t batch,
           int64_t height, int64_t width, Pointer workspace, int threads, int isa) {
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
            a.chroma = a.luma + std::min(batch, differentiable_jpeg_group(height, width)) * a.luma_size();
            const Run run{threads, isa};
            grad ? differentiable_jpeg_backward(a, run) : differentiable_jpeg(a, run);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("guidance_step_workspace", [](int64_t batch, int64_t, int64_t positions) {
        return batch * guidance_step_chunks(positions) * kGuidanceSums;
    });
    m.def(
        "guidance_magnitude",
        [](Pointer sums, Pointer cond, Pointer uncond, int dtype, int64_t batch, int64_t channels,
           int64_t positions, bool channels_last, int64_t cond_stride, int64_t uncond_stride,
           Pointer workspace, int threads, int isa) {
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
            guidance_step(a, at<float>(sums), at<double>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "guidance_step",
        [](Pointer out, Pointer x, Pointer cond, Pointer uncond, Pointer noise, int dtype, int model_dtype,
           int64_t batch, int64_t channels, int64_t positions, bool channels_last, int64_t out_stride,
           int64_t x_stride, int64_t cond_stride, int64_t uncond_stride, int64_t noise_stride, float scale,
           Pointer scales, Pointer coefficients, int64_t coefficients_stride, int prediction, float clip,
           Pointer sums, Pointer workspace, int threads, int isa) {
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
            guidance_step(a, at<float>(sums), at<double>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("low_rank_edit_workspace", [](const std::vector<int64_t>&, int64_t rank, int threads, int) {
        return threads * kEditRows * rank;
    });
    m.def(
        "low_rank_edit",
        [](const std::vector<Pointer>& weights, const std::vector<int64_t>& rows,
           const std::vector<int64_t>& strides, int dtype, int64_t columns, int64_t rank, Pointer up,
           Pointer down, Pointer workspace, int threads, int isa) {
            std::vector<LowRankMatrix> matrices;
            for (size_t i = 0; i < weights.size(); ++i)
                matrices.push_back({at<void>(weights[i]), rows[i], strides[i]});
            const LowRankEdit a{static_cast<Dtype>(dtype), columns, rank, at<float>(up), at<float>(down)};
            low_rank_edit(a, matrices.data(), matrices.size(), at<float>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "median_filter",
        [](Pointer out, Pointer x, int dtype, int64_t planes, int64_t height, int64_t width, int size,
           int threads, int isa) {
            const MedianFilter a{at<void>(out), at<void>(x), static_cast<Dtype>(dtype), planes, height,
                                 width,         size};
            median_filter(a, {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("pgd_step_workspace", [](int64_t batch, int64_t size) {
        return batch * pgd_step_chunks(size) * static_cast<int64_t>(sizeof(PgdSums) / sizeof(double));
    });
    m.def(
        "pgd_step",
        [](Pointer out, Pointer x, Pointer grad, Pointer x0, int grad_dtype, int64_t batch, int64_t size,
           int64_t out_stride, int64_t x_stride, int64_t grad_stride, int64_t x0_stride, float step,
           Pointer steps, float eps, float lower, float upper, Pointer l2_workspace, int threads, int isa) {
            const PgdStep a{
                at<float>(out), at<float>(x), at<void>(grad),   at<float>(x0), static_cast<Dtype>(grad_dtype),
                batch,          size,         out_stride,       x_stride,      grad_stride,
                x0_stride,      step,         at<float>(steps), eps,           lower,
                upper};
            if (l2_workspace)
                pgd_step_l2(a, at<PgdSums>(l2_workspace), {threads, isa});
            else
                pgd_step_linf(a, {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("separable_sum_workspace", separable_sum_workspace);
    m.def(
        "separable_sum",
        [](Pointer out, Pointer images, int64_t planes, int64_t height, int64_t width, Pointer rows,
           int64_t row_count, int64_t row_terms, Pointer columns, int64_t column_count, int64_t column_terms,
           Pointer workspace, int threads, int isa) {
            const Taps down{at<float>(rows), row_count, row_terms};
            const Taps across{at<float>(columns), column_count, column_terms};
            const SeparableSum a{at<float>(out), at<float>(images), planes, height, width, down, across};
            separable_sum(a, at<float>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());

    m.def("total_variation_workspace", total_variation_workspace);
    m.def(
        "total_variation",
        [](Pointer out, Pointer images, int64_t samples, int64_t channels, int64_t height, int64_t width,
           float weight, Pointer weights, int iterations, bool isotropic, Pointer workspace, int threads,
           int isa) {
            const TotalVariation a{at<float>(out), at<float>(images),  samples,    channels, height, width,
                                   weight,         at<float>(weights), iterations, isotropic};
            total_variation(a, at<float>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("group_norm_silu_workspace",
          [](int64_t batch, int64_t channels, int64_t size, int64_t groups, bool last) {
              return last ? batch * group_norm_silu_chunks(channels, size) * 2 * groups : 0;
          });
    m.def(
        "group_norm_silu",
        [](Pointer x, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, int dtype, int weight_dtype,
           int bias_dtype, int64_t batch, int64_t channels, int64_t size, int64_t groups, bool channels_last,
           Pointer y, float eps, Pointer workspace, int threads, int isa) {
            const auto a = group_norm_args(x, weight, bias, mean, rstd, dtype, weight_dtype, bias_dtype,
                                           batch, channels, size, groups, channels_last);
            group_norm_silu(a, at<void>(y), eps, at<double>(workspace), {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("group_norm_silu_backward_workspace",
          [](int64_t batch, int64_t channels, int64_t size, int64_t, bool last) {
              return last ? batch * group_norm_silu_chunks(channels, size) * 2 * channels : 0;
          });
    m.def(
        "group_norm_silu_backward",
        [](Pointer x, Pointer weight, Pointer bias, Pointer mean, Pointer rstd, int dtype, int weight_dtype,
           int bias_dtype, int64_t batch, int64_t channels, int64_t size, int64_t groups, bool channels_last,
           Pointer dy, Pointer dx, Pointer sums, Pointer workspace, int threads, int isa) {
            const auto a = group_norm_args(x, weight, bias, mean, rstd, dtype, weight_dtype, bias_dtype,
                                           batch, channels, size, groups, channels_last);
            group_norm_silu_backward(a, at<void>(dy), at<void>(dx), at<float>(sums), at<float>(workspace),
                                     {threads, isa});
        },
        py::call_guard<py::gil_scoped_release>());
}
