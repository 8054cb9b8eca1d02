// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// Box-Muller transform. One call makes the noise of four neighbouring latents of one sample.
#pragma once

#include "arithmetic.h"

namespace bvae {

struct Words {
  uint32_t w[4];
};

struct Normals {
  float n[4];
};

// All 64 bits of a product. nvcc makes an addition of 0 to its upper half besides, in every round.
BVAE_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

BVAE_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = multiply_wide(0xD2511F53u, c0);
    const uint64_t p1 = multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The words for latents 4 quad .. 4 quad + 3 of the sample with this index in the global batch.
BVAE_HD Words philox_quad(RngState rng, int64_t sample, int64_t quad) {
  const uint64_t seed = static_cast<uint64_t>(rng.seed);
  const uint64_t offset = static_cast<uint64_t>(rng.offset);
  return philox(static_cast<uint32_t>(quad), static_cast<uint32_t>(sample), static_cast<uint32_t>(offset),
                static_cast<uint32_t>(offset >> 32), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Two words to two independent standard normals. The first gives the radius, u in (0, 1]; the second the angle.
BVAE_HD void box_muller(uint32_t a, uint32_t b, float* first, float* second) {
  const float u = fused(static_cast<float>(a), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  polar(square_root(minus_two_log(u)), b, second, first);
}

BVAE_HD Normals normals(Words words) {
  Normals out;
  box_muller(words.w[0], words.w[1], &out.n[0], &out.n[1]);
  box_muller(words.w[2], words.w[3], &out.n[2], &out.n[3]);
  return out;
}

}  // namespace bvae
