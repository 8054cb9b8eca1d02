// IEEE half for the emulation of CUDA, over the conversions of the CPU loops.
#pragma once

#include "half.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) { return bvae::float_from_f16(v.bits); }
inline __half __float2half_rn(float v) { return {bvae::f16_from_float(v)}; }
