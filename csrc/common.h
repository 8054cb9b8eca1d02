// Definitions that every file here shares: element types, and marks for code that runs on host and device alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// `static`: each translation unit keeps its own copy. The CPU loops are compiled once per instruction set, and the
// linker must not merge an AVX-512 copy of an inline function into code that runs on a machine without it.
#ifdef __CUDACC__
#define BVAE_HD static __host__ __device__ __forceinline__
#else
#define BVAE_HD [[maybe_unused]] static inline __attribute__((always_inline))
#endif

namespace bvae {

enum class DType : int { f32, f64, bf16, f16, u8 };

// {seed, offset}, read on the device that owns the generator.
struct RngState {
  int64_t seed;
  int64_t offset;
};

// An [B, k] matrix whose rows are dense; the two halves of one [B, 2k] head are such matrices.
struct Rows {
  const void* data;
  int64_t stride;  // elements from a row to the next
};

}  // namespace bvae
