// What the CUDA kernels share: the device, loads of 16 bytes, sums over a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "math/common.h"

namespace pumice {

constexpr int kThreads = 256;

// Every launcher runs under one: the caller's current device may be another than the tensors'.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cudaGetDevice(&before_);
        if (before_ != device) cudaSetDevice(device);
        device_ = device;
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    int device_ = 0;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float load_one(const void* data, Dtype dtype, int64_t offset) {
    if (dtype == Dtype::f16) return to_float(static_cast<const __half*>(data)[offset]);
    if (dtype == Dtype::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[offset]);
    return static_cast<const float*>(data)[offset];
}

// V elements, moved in words of up to 16 bytes. The address must be a multiple of that; see `vectors`.
template <class T, int V>
struct Pack {
    static constexpr int kBytes = V * static_cast<int>(sizeof(T));
    static constexpr int kAlign = kBytes < 16 ? kBytes : 16;
    struct alignas(kAlign) Word {
        T values[kAlign / sizeof(T)];
    };
    static constexpr int kPerWord = kAlign / static_cast<int>(sizeof(T));
    static constexpr int kWords = kBytes / kAlign;

    static __device__ __forceinline__ void load(const T* from, float (&to)[V]) {
        Word words[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[w] = reinterpret_cast<const Word*>(from)[w];
#pragma unroll
        for (int k = 0; k < V; ++k) to[k] = to_float(words[k / kPerWord].values[k % kPerWord]);
    }
    static __device__ __forceinline__ void store(T* to, const float (&from)[V]) {
        Word words[kWords];
#pragma unroll
        for (int k = 0; k < V; ++k) words[k / kPerWord].values[k % kPerWord] = from_float<T>(from[k]);
#pragma unroll
        for (int w = 0; w < kWords; ++w) reinterpret_cast<Word*>(to)[w] = words[w];
    }
};

template <class T, int V>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
    Pack<T, V>::load(from, to);
}
template <class T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
    Pack<T, V>::store(to, from);
}

// Whether a tensor can be walked V elements at a time: its base and its batch stride allow it.
template <int V>
inline bool vectors(const void* data, int element_size, int64_t stride) {
    const int bytes = V * element_size < 16 ? V * element_size : 16;
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride % V == 0;
}

// Calls function(T()) with the storage type: one launcher body, three kernels.
template <class Function>
inline void with_type(Dtype dtype, const Function& function) {
    switch (dtype) {
        case Dtype::f32:
            function(float());
            break;
        case Dtype::f16:
            function(__half());
            break;
        case Dtype::bf16:
            function(__nv_bfloat16());
            break;
    }
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The sum of a block of kThreads, valid in every thread; the order is fixed, so are the bits.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
    __shared__ T partial[kThreads / 32];
    value = warp_sum(value);
    __syncthreads();  // an earlier call's readers are done
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) total += partial[warp];
    return total;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `work` threads' worth of items: enough to fill any GPU several times, the rest by grid strides.
inline unsigned blocks_for(int64_t items) {
    const int64_t most = 1 << 14;
    const int64_t wanted = ceil_div(items, kThreads);
    return static_cast<unsigned>(wanted < most ? wanted : most);
}

inline unsigned batch_blocks(int64_t batch) { return static_cast<unsigned>(batch < 65535 ? batch : 65535); }

}  // namespace pumice
