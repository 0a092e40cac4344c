#include "cpu/differentiable_jpeg.h"

#include "cpu/tile.h"

namespace pumice {
namespace PUMICE_ISA {
namespace {

typedef float Eight __attribute__((vector_size(32)));

constexpr int kColumns = 256;  // of a tile, so that it stays in the first-level cache
constexpr int kHalo = 2;       // pixels beyond a tile whose gradient reaches its chroma, by whole pairs
constexpr int kRow = kColumns + 2 * kHalo;

struct Planes {  // 16 rows of luma, 8 of each chroma
    float luma[16][kColumns];
    float chroma[2][8][kColumns / 2];
};

// Columns [left, right) of a strip of 16 rows from `top`; some may be beyond the picture.
struct Tile {
    int64_t sample, top, left;
    int columns;  // a multiple of 16
    int real;     // of them in the picture
};

struct Coding {  // of luma and of chroma
    Eight table[2][8], inverse[2][8];

    Coding(const DifferentiableJpeg& a, int64_t sample) {
        const float* from = a.tables + sample * 128;
        for (int plane = 0; plane < 2; ++plane)
            for (int row = 0; row < 8; ++row) {
                memcpy(&table[plane][row], from + (plane * 8 + row) * 8, sizeof(Eight));
                inverse[plane][row] = 1.0f / table[plane][row];
            }
    }
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Body>
inline void each_tile(const DifferentiableJpeg& a, int64_t sample, int64_t strip, const Body& body) {
    for (int64_t left = 0; left < a.width; left += kColumns) {
        const int columns = static_cast<int>(least(kColumns, a.padded_width() - left));
        body(Tile{sample, strip * 16, left, columns, static_cast<int>(least(columns, a.width - left))});
    }
}

// ---- blocks
// ------------------------------------------------------------------------------------------------------

PUMICE_INLINE void transpose(Eight (&x)[8]) {
    Eight t[8], u[8];
    for (int k = 0; k < 8; k += 2) {
        t[k] = __builtin_shufflevector(x[k], x[k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[k + 1] = __builtin_shufflevector(x[k], x[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int k = 0; k < 8; k += 4)
        for (int j = 0; j < 2; ++j) {
            u[k + 2 * j] = __builtin_shufflevector(t[k + j], t[k + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            u[k + 2 * j + 1] = __builtin_shufflevector(t[k + j], t[k + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int k = 0; k < 4; ++k) {
        x[k] = __builtin_shufflevector(u[k], u[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[k + 4] = __builtin_shufflevector(u[k], u[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

PUMICE_INLINE void load_block(const float* from, int64_t stride, Eight (&x)[8]) {
    for (int k = 0; k < 8; ++k) memcpy(&x[k], from + k * stride, sizeof(Eight));
}

PUMICE_INLINE void store_block(const Eight (&x)[8], float* to, int64_t stride) {
    for (int k = 0; k < 8; ++k) memcpy(to + k * stride, &x[k], sizeof(Eight));
}

// Both end and begin in rows by columns of the picture.
PUMICE_INLINE void dct(Eight (&x)[8]) {
    jpeg_dct(x);
    transpose(x);
    jpeg_dct(x);
    transpose(x);
}

PUMICE_INLINE void idct(Eight (&x)[8]) {
    jpeg_idct(x);
    transpose(x);
    jpeg_idct(x);
    transpose(x);
}

inline void code_blocks(const float* from, int64_t from_stride, float* to, int64_t to_stride, int columns,
                        const Eight (&table)[8], const Eight (&inverse)[8]) {
    for (int c = 0; c < columns; c += 8) {
        Eight x[8];
        load_block(from + c, from_stride, x);
        dct(x);
        for (int k = 0; k < 8; ++k) {
            x[k] *= inverse[k];
            jpeg_round(x[k]);
            x[k] *= table[k];
        }
        idct(x);
        store_block(x, to + c, to_stride);
    }
}

// gradient: in what was decoded, then in what was coded from `from`. The table cancels.
inline void gradient_blocks(const float* from, float* gradient, int64_t stride, int columns,
                            const Eight (&inverse)[8]) {
    for (int c = 0; c < columns; c += 8) {
        Eight x[8], g[8];
        load_block(from + c, stride, x);
        dct(x);
        load_block(gradient + c, stride, g);
        dct(g);
        for (int k = 0; k < 8; ++k) {
            x[k] *= inverse[k];
            jpeg_slope(x[k]);
            g[k] *= x[k];
        }
        idct(g);
        store_block(g, gradient + c, stride);
    }
}

// ---- rows
// --------------------------------------------------------------------------------------------------------

// n pixels from (row, column) on, red, green and blue.
struct RgbRun {
    float buffers[3][kRow];
    const float* of[3];

    RgbRun(const DifferentiableJpeg& a, const void* data, int64_t sample, int64_t row, int64_t column,
           int64_t n) {
        for (int k = 0; k < 3; ++k)
            of[k] = load_run(data, a.dtype, ((sample * 3 + k) * a.height + row) * a.width + column, n,
                             buffers[k]);
    }
};

inline void store_rgb(const DifferentiableJpeg& a, const Tile& t, int64_t row, int n, const Rgb* from) {
    float planes[3][kColumns];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        planes[0][i] = from[i].red;
        planes[1][i] = from[i].green;
        planes[2][i] = from[i].blue;
    }
    for (int k = 0; k < 3; ++k) {
        const int64_t at = ((t.sample * 3 + k) * a.height + row) * a.width + t.left;
        if (a.dtype == Dtype::f32)
            memcpy(static_cast<float*>(a.out) + at, planes[k], static_cast<size_t>(n) * sizeof(float));
        else
            store_run(a.out, a.dtype, at, n, planes[k]);
    }
}

// The pictures as luma and averaged chroma, continued by their last row and column.
inline void load_planes(const DifferentiableJpeg& a, const Tile& t, Planes& to) {
    float blueness[kColumns], redness[kColumns];
    for (int r = 0; r < 16; ++r) {
        const RgbRun rgb(a, a.images, t.sample, least(t.top + r, a.height - 1), t.left, t.real);
        const float *red = rgb.of[0], *green = rgb.of[1], *blue = rgb.of[2];
        float* luma = to.luma[r];
#pragma omp simd
        for (int i = 0; i < t.real; ++i) {
            const Ycc c = jpeg_ycc(red[i], green[i], blue[i]);
            luma[i] = c.luma;
            blueness[i] = c.blueness;
            redness[i] = c.redness;
        }
        for (int i = t.real; i < t.columns; ++i) {
            luma[i] = luma[t.real - 1];
            blueness[i] = blueness[t.real - 1];
            redness[i] = redness[t.real - 1];
        }
        float *b = to.chroma[0][r / 2], *d = to.chroma[1][r / 2];
        if (r % 2 == 0) {
#pragma omp simd
            for (int j = 0; j < t.columns / 2; ++j) {
                b[j] = blueness[2 * j] + blueness[2 * j + 1];
                d[j] = redness[2 * j] + redness[2 * j + 1];
            }
        } else {
#pragma omp simd
            for (int j = 0; j < t.columns / 2; ++j) {
                b[j] = 0.25f * (b[j] + (blueness[2 * j] + blueness[2 * j + 1]));
                d[j] = 0.25f * (d[j] + (redness[2 * j] + redness[2 * j + 1]));
            }
        }
    }
}

// Decoded chroma of n pixels of a row from an even column on; writes one more where n is odd.
inline void interpolate_row(const DifferentiableJpeg& a, int64_t sample, int plane, int64_t row,
                            int64_t column, int n, float* to) {
    const int64_t width = a.padded_width() / 2, end = a.chroma_width(), j = column / 2;
    const int64_t i = row / 2, other = row % 2 ? least(i + 1, a.chroma_height() - 1) : most(i - 1, 0);
    const float* base = a.chroma + (sample * 2 + plane) * a.chroma_size() + j;
    const float *near = base + i * width, *far = base + other * width;
    const int count = (n + 1) / 2;
    float along[kRow / 2 + 2];
    float* v = along + 1;
#pragma omp simd
    for (int k = 0; k < count; ++k) v[k] = jpeg_blend(near[k], far[k]);
    v[-1] = j > 0 ? jpeg_blend(near[-1], far[-1]) : v[0];
    v[count] = j + count < end ? jpeg_blend(near[count], far[count]) : v[count - 1];
#pragma omp simd
    for (int k = 0; k < count; ++k) {
        to[2 * k] = jpeg_blend(v[k], v[k - 1]);
        to[2 * k + 1] = jpeg_blend(v[k], v[k + 1]);
    }
}

inline const float* luma_row(const DifferentiableJpeg& a, int64_t sample, int64_t row) {
    return a.luma + sample * a.luma_size() + row * a.padded_width();
}

// The gradient of interpolation: a row of pixels, of which those at -1 and 2 * count are ghosts, into `count`
// samples.
inline void interpolate_row_adjoint(const float* pixels, int count, float weight, float* to) {
#pragma omp simd
    for (int k = 0; k < count; ++k)
        to[k] +=
            weight * jpeg_blend(pixels[2 * k] + pixels[2 * k + 1], pixels[2 * k - 1] + pixels[2 * k + 2]);
}

// The gradient in decoded luma and chroma from that in the result; 0 beyond the picture.
inline void load_gradient(const DifferentiableJpeg& a, const Tile& t, Planes& to) {
    memset(&to, 0, sizeof to);
    const int64_t begin = most(0, t.left - kHalo), end = least(a.width, t.left + t.columns + kHalo);
    const int n = static_cast<int>(end - begin), shift = static_cast<int>(begin - (t.left - kHalo));
    const int count = static_cast<int>(least(t.columns / 2, a.chroma_width() - t.left / 2));
    float chroma[2][kRow], gradient[3][kRow];
    memset(gradient, 0, sizeof gradient);
    float *luma = gradient[0] + shift, *blueness = gradient[1] + shift, *redness = gradient[2] + shift;
    for (int64_t row = most(0, t.top - 1); row < least(a.height, t.top + 17); ++row) {
        const RgbRun g(a, a.grad, t.sample, row, begin, n);
        const float *red = g.of[0], *green = g.of[1], *blue = g.of[2];
        const float* decoded = luma_row(a, t.sample, row) + begin;
        for (int plane = 0; plane < 2; ++plane)
            interpolate_row(a, t.sample, plane, row, begin, n, chroma[plane]);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const Rgb value = jpeg_rgb({decoded[i], chroma[0][i], chroma[1][i]});
            const Ycc ycc =
                jpeg_rgb_adjoint({jpeg_inside(value.red, red[i]), jpeg_inside(value.green, green[i]),
                                  jpeg_inside(value.blue, blue[i])});
            luma[i] = ycc.luma;
            blueness[i] = ycc.blueness;
            redness[i] = ycc.redness;
        }
        const bool own = row >= t.top && row < t.top + 16;
        if (own) memcpy(to.luma[row - t.top], gradient[0] + kHalo, sizeof(float) * t.real);
        // Interpolation repeats the first and the last sample.
        const int64_t i = row / 2, last = a.chroma_height() - 1;
        const int64_t other = row % 2 ? least(i + 1, last) : most(i - 1, 0);
        for (int plane = 0; plane < 2; ++plane) {
            float* pixels = gradient[1 + plane] + kHalo;
            if (t.left == 0) pixels[-1] = pixels[0];
            if (t.left + 2 * count >= a.width && a.width % 2 == 0) pixels[2 * count] = pixels[2 * count - 1];
            const int64_t near = i - t.top / 2, far = other - t.top / 2;
            if (near >= 0 && near < 8) interpolate_row_adjoint(pixels, count, 0.75f, to.chroma[plane][near]);
            if (far >= 0 && far < 8) interpolate_row_adjoint(pixels, count, 0.25f, to.chroma[plane][far]);
        }
    }
}

// A sample of chroma is the mean of four pixels.
inline void add_row(const Planes& from, int row, int columns, float* luma, float* blueness, float* redness) {
    const float *b = from.chroma[0][row / 2], *d = from.chroma[1][row / 2];
#pragma omp simd
    for (int i = 0; i < columns; ++i) luma[i] += from.luma[row][i];
#pragma omp simd
    for (int j = 0; j < columns / 2; ++j) {
        blueness[2 * j] += 0.25f * b[j];
        blueness[2 * j + 1] += 0.25f * b[j];
        redness[2 * j] += 0.25f * d[j];
        redness[2 * j + 1] += 0.25f * d[j];
    }
}

}  // namespace

void differentiable_jpeg_code(const DifferentiableJpeg& a, int64_t sample, int64_t strip) {
    const Coding coding(a, sample);
    const int64_t width = a.padded_width();
    each_tile(a, sample, strip, [&](const Tile& t) {
        Planes planes;
        load_planes(a, t, planes);
        for (int r = 0; r < 16; r += 8)
            code_blocks(planes.luma[r], kColumns,
                        a.luma + sample * a.luma_size() + (t.top + r) * width + t.left, width, t.columns,
                        coding.table[0], coding.inverse[0]);
        for (int plane = 0; plane < 2; ++plane)
            code_blocks(
                planes.chroma[plane][0], kColumns / 2,
                a.chroma + (sample * 2 + plane) * a.chroma_size() + t.top / 2 * (width / 2) + t.left / 2,
                width / 2, t.columns / 2, coding.table[1], coding.inverse[1]);
    });
}

void differentiable_jpeg_decode(const DifferentiableJpeg& a, int64_t sample, int64_t strip) {
    float chroma[2][kRow];
    Rgb rgb[kColumns];
    each_tile(a, sample, strip, [&](const Tile& t) {
        for (int64_t row = t.top; row < least(a.height, t.top + 16); ++row) {
            for (int plane = 0; plane < 2; ++plane)
                interpolate_row(a, sample, plane, row, t.left, t.real, chroma[plane]);
            const float* luma = luma_row(a, sample, row) + t.left;
#pragma omp simd
            for (int i = 0; i < t.real; ++i) {
                const Rgb value = jpeg_rgb({luma[i], chroma[0][i], chroma[1][i]});
                rgb[i] = {clamp(value.red, 0, 1), clamp(value.green, 0, 1), clamp(value.blue, 0, 1)};
            }
            store_rgb(a, t, row, t.real, rgb);
        }
    });
}

void differentiable_jpeg_gradient(const DifferentiableJpeg& a, int64_t sample, int64_t strip) {
    const Coding coding(a, sample);
    Rgb rgb[kColumns];
    each_tile(a, sample, strip, [&](const Tile& t) {
        Planes planes, gradient;
        load_planes(a, t, planes);
        load_gradient(a, t, gradient);
        for (int r = 0; r < 16; r += 8)
            gradient_blocks(planes.luma[r], gradient.luma[r], kColumns, t.columns, coding.inverse[0]);
        for (int plane = 0; plane < 2; ++plane)
            gradient_blocks(planes.chroma[plane][0], gradient.chroma[plane][0], kColumns / 2, t.columns / 2,
                            coding.inverse[1]);
        const int rows = static_cast<int>(least(16, a.height - t.top));
        for (int r = 0; r < rows; ++r) {
            float luma[kColumns] = {0}, blueness[kColumns] = {0}, redness[kColumns] = {0};
            // The last row and column were repeated.
            for (int k = r; k == r || (r == rows - 1 && k < 16); ++k)
                add_row(gradient, k, t.columns, luma, blueness, redness);
            for (int i = t.real; i < t.columns; ++i) {
                luma[t.real - 1] += luma[i];
                blueness[t.real - 1] += blueness[i];
                redness[t.real - 1] += redness[i];
            }
#pragma omp simd
            for (int i = 0; i < t.real; ++i) rgb[i] = jpeg_ycc_adjoint({luma[i], blueness[i], redness[i]});
            store_rgb(a, t, t.top + r, t.real, rgb);
        }
    });
}

}  // namespace PUMICE_ISA
}  // namespace pumice
