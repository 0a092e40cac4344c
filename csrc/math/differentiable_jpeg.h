// JPEG and its gradient. The definition is `reference` in python/pumice/ops/differentiable_jpeg.py.
#pragma once

#include "math/common.h"

namespace pumice {

// images, out, grad: (batch, 3, height, width), dense. Coded planes are whole 16 x 16 macroblocks.
struct DifferentiableJpeg {
    void* out;  // the pictures, or the gradient in them
    const void* images;
    const void* grad;     // in the output; backward only
    const float* tables;  // (batch, 2, 8, 8)
    float* luma;          // (batch, padded height, padded width): decoded
    float* chroma;        // (batch, 2, padded height / 2, padded width / 2): decoded
    Dtype dtype;
    int64_t batch, height, width;

    PUMICE_MEMBER int64_t strips() const { return (height + 15) / 16; }
    PUMICE_MEMBER int64_t padded_width() const { return (width + 15) / 16 * 16; }
    PUMICE_MEMBER int64_t luma_size() const { return strips() * 16 * padded_width(); }
    PUMICE_MEMBER int64_t chroma_size() const { return luma_size() / 4; }
    PUMICE_MEMBER int64_t chroma_height() const { return (height + 1) / 2; }  // without the continuation
    PUMICE_MEMBER int64_t chroma_width() const { return (width + 1) / 2; }
};

// Floats of luma and chroma together.
inline int64_t differentiable_jpeg_workspace(int64_t batch, int64_t height, int64_t width) {
    return batch * ((height + 15) / 16) * ((width + 15) / 16) * 384;
}

// In levels of 255; luma around 0.
struct Ycc {
    float luma, blueness, redness;
};
struct Rgb {
    float red, green, blue;
};

PUMICE_INLINE Ycc jpeg_ycc(float red, float green, float blue) {
    red *= 255;
    green *= 255;
    blue *= 255;
    const float luma = 0.299f * red + 0.587f * green + 0.114f * blue - 128;
    return {luma, (blue - luma - 128) * (1 / 1.772f), (red - luma - 128) * (1 / 1.402f)};
}

// In [0, 1] where it was: not clamped yet.
PUMICE_INLINE Rgb jpeg_rgb(Ycc c) {
    const float red = c.luma + 1.402f * c.redness, blue = c.luma + 1.772f * c.blueness;
    const float green = (c.luma - 0.299f * red - 0.114f * blue) * (1 / 0.587f);
    return {(red + 128) / 255, (green + 128) / 255, (blue + 128) / 255};
}

// The adjoints of the two, but for their factors of 255, which cancel.
PUMICE_INLINE Ycc jpeg_rgb_adjoint(Rgb g) {
    const float green = g.green * (1 / 0.587f);
    const float red = g.red - 0.299f * green, blue = g.blue - 0.114f * green;
    return {green + red + blue, 1.772f * blue, 1.402f * red};
}

PUMICE_INLINE Rgb jpeg_ycc_adjoint(Ycc g) {
    const float blue = g.blueness * (1 / 1.772f), red = g.redness * (1 / 1.402f);
    const float luma = g.luma - blue - red;
    return {0.299f * luma + red, 0.587f * luma, 0.114f * luma + blue};
}

// The gradient of clamp(value, 0, 1), as torch has it.
PUMICE_INLINE float jpeg_inside(float value, float gradient) {
    return value >= 0 && value <= 1 ? gradient : 0.0f;
}

// In place: to the nearest whole level, halves to the even one. V is float or a vector of floats.
template <class V>
PUMICE_INLINE void jpeg_round(V& level) {
    const float big = 12582912.0f;  // 1.5 * 2^23: what is added to it has no room for a fraction
    level = (level + big) - big;
}

// In place: the slope of round(level) + (level - round(level))^3.
template <class V>
PUMICE_INLINE void jpeg_slope(V& level) {
    V whole = level;
    jpeg_round(whole);
    level -= whole;
    level *= 3.0f * level;
}

// The orthonormal DCT of 8 values, in place: sums and differences of opposite ones, then 4 x 4 products.
template <class V>
PUMICE_INLINE void jpeg_dct(V (&x)[8]) {
    const float a = 0.353553391f, c1 = 0.490392640f, c2 = 0.461939766f, c3 = 0.415734806f, c5 = 0.277785117f,
                c6 = 0.191341716f, c7 = 0.0975451610f;  // cos(k pi / 16) / 2
    const V s0 = x[0] + x[7], s1 = x[1] + x[6], s2 = x[2] + x[5], s3 = x[3] + x[4];
    const V d0 = x[0] - x[7], d1 = x[1] - x[6], d2 = x[2] - x[5], d3 = x[3] - x[4];
    x[0] = a * ((s0 + s3) + (s1 + s2));
    x[4] = a * ((s0 + s3) - (s1 + s2));
    x[2] = c2 * (s0 - s3) + c6 * (s1 - s2);
    x[6] = c6 * (s0 - s3) - c2 * (s1 - s2);
    x[1] = c1 * d0 + c3 * d1 + c5 * d2 + c7 * d3;
    x[3] = c3 * d0 - c7 * d1 - c1 * d2 - c5 * d3;
    x[5] = c5 * d0 - c1 * d1 + c7 * d2 + c3 * d3;
    x[7] = c7 * d0 - c5 * d1 + c3 * d2 - c1 * d3;
}

// Its transpose, and so its inverse.
template <class V>
PUMICE_INLINE void jpeg_idct(V (&x)[8]) {
    const float a = 0.353553391f, c1 = 0.490392640f, c2 = 0.461939766f, c3 = 0.415734806f, c5 = 0.277785117f,
                c6 = 0.191341716f, c7 = 0.0975451610f;
    const V p = a * (x[0] + x[4]), q = a * (x[0] - x[4]);
    const V r = c2 * x[2] + c6 * x[6], t = c6 * x[2] - c2 * x[6];
    const V s0 = p + r, s3 = p - r, s1 = q + t, s2 = q - t;
    const V d0 = c1 * x[1] + c3 * x[3] + c5 * x[5] + c7 * x[7];
    const V d1 = c3 * x[1] - c7 * x[3] - c1 * x[5] - c5 * x[7];
    const V d2 = c5 * x[1] - c1 * x[3] + c7 * x[5] + c3 * x[7];
    const V d3 = c7 * x[1] - c5 * x[3] + c3 * x[5] - c1 * x[7];
    x[0] = s0 + d0;
    x[7] = s0 - d0;
    x[1] = s1 + d1;
    x[6] = s1 - d1;
    x[2] = s2 + d2;
    x[5] = s2 - d2;
    x[3] = s3 + d3;
    x[4] = s3 - d3;
}

// Chroma is interpolated by 3/4 and 1/4: first along the column, then along the row; at an edge by itself.
PUMICE_INLINE float jpeg_blend(float near, float far) { return 0.75f * near + 0.25f * far; }

}  // namespace pumice
