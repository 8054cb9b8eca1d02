// Adam for one element, and what decides whether a step is taken: shared by the CPU loops and the CUDA kernels.
//
// Multiplications, divisions and roots here are all rounded to nearest and none is fused, so that CPU and GPU, whatever
// the instruction set, give the same bits (but where the CPU was told to flush denormal numbers).
#pragma once

#include "arithmetic.h"

namespace bvae {

// Factors that are the same for all elements of a call.
struct AdamFactors {
  float old1, new1, old2, new2, eps;
};

// Corrections for one step count: step_size = lr / (1 - beta1^t), inverse = 1 / sqrt(1 - beta2^t).
struct AdamCorrections {
  float step_size, inverse;
};

// base^n by squaring, and not libm's pow, of which the host and the device have one each.
BVAE_HD double power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if ((n & 1) != 0) result *= base;
    base *= base;
  }
  return result;
}

// `step` is counted from 1.
BVAE_HD AdamCorrections adam_corrections(double lr, double beta1, double beta2, float step) {
  const int64_t t = static_cast<int64_t>(step);
  AdamCorrections c;
  c.step_size = static_cast<float>(lr / (1.0 - power(beta1, t)));
  c.inverse = static_cast<float>(1.0 / sqrt(1.0 - power(beta2, t)));
  return c;
}

BVAE_HD AdamFactors adam_factors(double beta1, double beta2, double eps) {
  // 1 - beta in double: 0.999 rounded to float would put an error of 5e-5 into it.
  return {static_cast<float>(beta1), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2), static_cast<float>(eps)};
}

BVAE_HD void adam_element(const AdamFactors& f, const AdamCorrections& c, float grad, float* parameter, float* exp_avg,
                          float* exp_avg_sq) {
  const float m = f.old1 * *exp_avg + f.new1 * grad;
  const float v = f.old2 * *exp_avg_sq + f.new2 * grad * grad;
  *exp_avg = m;
  *exp_avg_sq = v;
  *parameter -= c.step_size * m / (sqrtf(v) * c.inverse + f.eps);
}

// The bits of |x|, which are ordered as the numbers are, with infinity and then NaN above all of them.
BVAE_HD int32_t magnitude(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }

// Bits of 2^64, the least number whose square is not finite in float: exp_avg_sq would stay infinite for good.
constexpr int32_t kTooLarge = 0x5f800000;

}  // namespace bvae
