// What the kernels share: element conversions, vector loads, deterministic reductions, the last-block pattern.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "arithmetic.h"
#include "cuda.h"

namespace bvae {

constexpr int kThreads = 256;

// Elements a thread takes at once: 16 bytes of a 2-byte type, twice that of float, and few enough doubles to keep their
// slower exp within the registers.
template <class T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 8;

template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float get(float v) { return v; }
  static __device__ __forceinline__ float put(float v) { return v; }
};
template <>
struct Element<double> {
  static __device__ __forceinline__ double get(double v) { return v; }
  static __device__ __forceinline__ double put(double v) { return v; }
};
template <>
struct Element<__nv_bfloat16> {
  static __device__ __forceinline__ float get(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 put(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Element<__half> {
  static __device__ __forceinline__ float get(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half put(float v) { return __float2half_rn(v); }
};

// The arithmetic type of an element type: double for double, float for the rest.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// A target element in the arithmetic type A; uint8 is scaled to [0, 1].
template <class A, class T>
__device__ __forceinline__ A target_value(T v) {
  return static_cast<A>(Element<T>::get(v));
}
template <>
__device__ __forceinline__ float target_value<float, uint8_t>(uint8_t v) {
  // v in the low mantissa bits of 2^23. A conversion instruction would share a slow pipe with the sigmoid's.
  return unit_from_u8(float_of(0x4b000000u | v) - 8388608.0f);
}
template <>
__device__ __forceinline__ double target_value<double, uint8_t>(uint8_t v) {
  return static_cast<double>(v) / 255.0;
}

// n neighbouring elements, moved in pieces of up to 16 bytes.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T v[n];
};

template <class T, int n>
bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, n>) == 0;
}

// The sum over a block of kThreads threads, in a fixed order; valid in thread 0. All threads must call it, and a
// second call needs a __syncthreads() first, for it uses the same shared memory.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int step = 16; step > 0; step >>= 1) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int step = 16; step > 0; step >>= 1) value += __shfl_down_sync(0xffffffffu, value, step);
  }
  return value;
}

// Draws a ticket once this block's writes are done; true in every thread of the block that draws the last one, which
// then sees what all the others wrote. `ticket` starts at 0. Every thread of the block must call it.
__device__ __forceinline__ bool is_last_block(unsigned int* ticket, unsigned int blocks) {
  __shared__ bool last;
  __threadfence();  // publish this thread's writes before the block's ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1u;
  __syncthreads();
  __threadfence();  // and read nothing of the others' from before it
  return last;
}

// A scalar that is float, or double where the inputs are double.
__device__ __forceinline__ double load_scalar(const void* p, bool is_double) {
  return is_double ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
}
__device__ __forceinline__ void store_scalar(void* p, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(p) = value;
  } else {
    *static_cast<float*>(p) = static_cast<float>(value);
  }
}

// Every launcher starts with cudaSetDevice: the CUDA runtime is linked statically and keeps its own current device,
// apart from the one that torch's runtime was switched to.
#define BVAE_CUDA_TRY(call)                                     \
  do {                                                          \
    const cudaError_t error_ = (call);                          \
    if (error_ != cudaSuccess) {                                \
      cudaGetLastError(); /* else the next launch reports it */ \
      return static_cast<int>(error_);                          \
    }                                                           \
  } while (0)

// The scratch memory of a last-block kernel: a ticket, then partial sums from byte 16 on.
constexpr int64_t kTicketBytes = 16;

__host__ __device__ inline unsigned int* scratch_ticket(void* scratch) { return static_cast<unsigned int*>(scratch); }
__host__ __device__ inline double* scratch_partials(void* scratch) {
  return reinterpret_cast<double*>(static_cast<char*>(scratch) + kTicketBytes);
}

}  // namespace bvae
