// Tools that the kernels share: element conversions, vector loads, deterministic reductions, the last-block pattern.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "arithmetic.h"
#include "cuda.h"

namespace bvae {

constexpr int kThreads = 256;

// Elements a thread takes at once: 16 bytes, so that a warp's accesses lie one behind the other.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Vectors whose loads a thread starts before it uses the first: they keep the memory busy. One for doubles, for their
// slower exp needs the registers.
template <class T>
constexpr int kAhead = sizeof(T) == 8 ? 1 : sizeof(T);

// Blocks of kThreads that are resident on a multiprocessor at once; a kernel of 8-byte arithmetic has fewer.
constexpr int kResident = 4;
template <class T>
constexpr int kBounds = sizeof(T) == 8 ? 2 : kResident;

// Enough blocks for `items` threads, and no more than the device holds at once: with a second wave, the last blocks
// would leave most of it idle.
inline unsigned int one_wave(int64_t items, Launch launch, int resident = kResident) {
  const int64_t wanted = (items + kThreads - 1) / kThreads;
  const int64_t most = static_cast<int64_t>(launch.multiprocessors) * resident;
  return static_cast<unsigned int>(wanted < 1 ? 1 : (wanted < most ? wanted : most));
}

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

// v in the low mantissa bits of 2^23: a conversion instruction would share a slow pipe with the sigmoid's.
__device__ __forceinline__ float float_above_2_23(uint8_t v) { return float_of(0x4b000000u | v); }

// v / 255, correctly rounded.
template <class A>
__device__ __forceinline__ A unit_value(uint8_t v) {
  if constexpr (sizeof(A) == 8) {
    return static_cast<double>(v) / 255.0;
  } else {
    return unit_from_u8(float_above_2_23(v) - 8388608.0f);
  }
}

// A target element in the arithmetic type A; uint8 as the batch gather makes its images.
template <class A, class T>
__device__ __forceinline__ A target_value(T v) {
  if constexpr (sizeof(T) > 1) {
    return static_cast<A>(Element<T>::get(v));
  } else {
    return unit_value<A>(v);
  }
}

// A type of n bytes that moves by one instruction.
template <size_t n>
struct Bytes;
template <>
struct Bytes<1> {
  using type = uint8_t;
};
template <>
struct Bytes<2> {
  using type = uint16_t;
};
template <>
struct Bytes<4> {
  using type = uint32_t;
};
template <>
struct Bytes<8> {
  using type = uint2;
};
template <>
struct Bytes<16> {
  using type = uint4;
};

// n neighbouring elements, moved in pieces of up to 16 bytes.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T v[n];
};

template <class Piece>
__device__ __forceinline__ void store_piece(Piece* p, const Piece& v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Piece) == 16) {
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    return;
  } else if constexpr (sizeof(Piece) == 8) {
    asm volatile("st.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
    return;
  }
#endif
  *p = v;
}

// The i-th of the packs from p on, by accesses of its whole width: left to itself, nvcc may store a vector's elements one
// by one.
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p, int64_t i = 0) {
  using P = Pack<T, n>;
  using Piece = typename Bytes<alignof(P)>::type;
  P pack;
#pragma unroll
  for (size_t j = 0; j < sizeof(P) / sizeof(Piece); ++j) {
    const Piece piece = reinterpret_cast<const Piece*>(reinterpret_cast<const P*>(p) + i)[j];
    memcpy(reinterpret_cast<char*>(&pack) + j * sizeof(Piece), &piece, sizeof(Piece));
  }
  return pack;
}

template <class T, int n>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, n>& pack, int64_t i = 0) {
  using P = Pack<T, n>;
  using Piece = typename Bytes<alignof(P)>::type;
#pragma unroll
  for (size_t j = 0; j < sizeof(P) / sizeof(Piece); ++j) {
    Piece piece;
    memcpy(&piece, reinterpret_cast<const char*>(&pack) + j * sizeof(Piece), sizeof(Piece));
    store_piece(&reinterpret_cast<Piece*>(reinterpret_cast<P*>(p) + i)[j], piece);
  }
}

template <class T, int n>
__host__ __device__ bool aligned(const void* p) {
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
