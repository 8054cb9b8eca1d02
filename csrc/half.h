// bfloat16 and IEEE half to and from float with integer operations only, so that loops over them vectorise on any
// CPU. Conversions to the narrow type round to nearest even.
#pragma once

#include "arithmetic.h"

namespace bvae {

BVAE_HD float float_from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

BVAE_HD uint16_t bf16_from_float(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

BVAE_HD float float_from_f16(uint16_t h) {
  // Shifting the fields into place leaves the exponent 112 too small; a multiplication mends it, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude | 0x7f800000u;                  // infinity and NaN
  const uint32_t u = magnitude >= 0x0f800000u ? special : bits_of(scaled);
  return float_of(u | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

BVAE_HD uint16_t f16_from_float(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  // Subnormal results: adding 0.5 aligns the last bit of half with the last bit of float, and the adder rounds.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // values that round to more than the largest half
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | sign);
}

}  // namespace bvae
