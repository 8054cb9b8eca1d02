// bfloat16 for the emulation of CUDA, over the conversions of the CPU loops.
#pragma once

#include "half.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return bvae::float_from_bf16(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {bvae::bf16_from_float(v)}; }
