// Arithmetic for one element, shared by the CPU loops and the CUDA kernels.
//
// The float functions are branch-free polynomials, so that a compiler vectorises a loop over them. On machines with
// fused multiply-add (every GPU, AVX2, AVX-512, NEON) they give the same bits everywhere; the build switches off
// the compiler's own contraction. Largest errors, checked by tests/test_ops.py and test_ops_noise.py: exp, expm1, log 2 ulp,
// sin and cos 2 ulp. The double functions call libm: they serve gradcheck, not speed.
#pragma once

#include "common.h"

// BVAE_FMA: set by the files whose instruction set is chosen by a pragma, which need not define __FMA__ (GCC 12).
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
#define BVAE_FMA 1
#endif

namespace bvae {

BVAE_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(BVAE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // libm's fmaf would be a function call per element
#endif
}

// sum + d^2, in one instruction where there is one.
BVAE_HD float add_square(float d, float sum) { return fused(d, d, sum); }
BVAE_HD double add_square(double d, double sum) { return sum + d * d; }

BVAE_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

BVAE_HD float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

// v / 255, correctly rounded, for v = 0, 1 ... 255: the reciprocal in two parts, and one rounding that counts.
BVAE_HD float unit_from_u8(float v) {
#ifdef BVAE_FMA
  constexpr float high = 1.0f / 255.0f;
  constexpr float low = static_cast<float>(1.0 / 255.0 - static_cast<double>(high));
  return fused(v, high, v * low);
#else
  return v / 255.0f;
#endif
}

// x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits:
// no conversion instruction, and a NaN stays a NaN in r.
BVAE_HD float split_exp(float x, int32_t* n) {
  const float shifter = 12582912.0f;
  const float t = fused(x, 1.44269504088896341f, shifter);
  *n = static_cast<int32_t>(bits_of(t) - bits_of(shifter));
  const float k = t - shifter;
  return fused(k, -1.42860677e-6f, fused(k, -0.693145752f, x));  // ln 2 in two parts
}

// e^r - 1 on |r| <= ln 2 / 2: Taylor's coefficients, the last two nudged to spread the error.
BVAE_HD float expm1_reduced(float r) {
  float p = 1.9841270e-4f;
  p = fused(p, r, 1.3888889e-3f);
  p = fused(p, r, 8.3333333e-3f);
  p = fused(p, r, 4.1666667e-2f);
  p = fused(p, r, 1.6666667e-1f);
  p = fused(p, r, 0.5f);
  return fused(p * r, r, r);
}

BVAE_HD float pow2(int32_t n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

#ifdef __CUDA_ARCH__
// The units' own 2^x and 1/x, within 2 ulp, results below 2^-126 flushed to 0: one instruction each. The loss kernels
// would otherwise be bound by arithmetic, not by memory.
BVAE_HD float exp_any(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
}
#endif

// e^x; beyond +-87 that of the nearer end, so that neither it nor its reciprocal is infinite or subnormal.
BVAE_HD float exp_bounded(float x) {
  const float size = fabsf(x);
  x = copysignf(size > 87.0f ? 87.0f : size, x);  // one comparison: of two, GCC makes a chain of masks
#ifdef __CUDA_ARCH__
  return exp_any(x);
#else
  int32_t n;
  const float r = split_exp(x, &n);
  const float scale = pow2(n);
  return fused(expm1_reduced(r), scale, scale);
#endif
}

BVAE_HD double exp_bounded(double x) {
  x = x < -700.0 ? -700.0 : x;
  return exp(x > 700.0 ? 700.0 : x);
}

BVAE_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

BVAE_HD double reciprocal(double x) { return 1.0 / x; }

// 1 / (1 + e^-x).
template <class A>
BVAE_HD A sigmoid(A x) {
  return reciprocal(A(1) + exp_bounded(-x));
}

// sigma = e^l and m = e^l - 1 from one reduction. sigma^2 - 1 = m (m + 2) keeps its digits near collapse, where
// l is close to 0 and e^(2l) - 1 would cancel.
BVAE_HD void exp_and_expm1(float l, float* sigma, float* m) {
  l = l < -104.0f ? -104.0f : (l > 89.0f ? 89.0f : l);  // beyond both ends the result is 0 or infinity
  int32_t n;
  const float q = expm1_reduced(split_exp(l, &n));
  const int32_t half = n >> 1;  // in two steps, so that neither factor leaves the normal range
  const float a = pow2(half);
  const float b = pow2(n - half);
  *sigma = fused(q, a, a) * b;
  const float scale = a * b;
  *m = n > 127 ? *sigma : fused(q, scale, scale - 1.0f);
}

BVAE_HD void exp_and_expm1(double l, double* sigma, double* m) {
  *sigma = exp(l);
  *m = expm1(l);
}

// ln u for u in (0, 1], normal numbers only.
BVAE_HD float log_unit(float u) {
  const uint32_t shifted = bits_of(u) - 0x3f3504f3u;  // so that the mantissa falls in [sqrt(1/2), sqrt 2)
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;  // Cephes logf
  p = fused(p, f, -1.1514610310e-1f);
  p = fused(p, f, 1.1676998740e-1f);
  p = fused(p, f, -1.2420140846e-1f);
  p = fused(p, f, 1.4249322787e-1f);
  p = fused(p, f, -1.6668057665e-1f);
  p = fused(p, f, 2.0000714765e-1f);
  p = fused(p, f, -2.4999993993e-1f);
  p = fused(p, f, 3.3333331174e-1f);
  const float k = static_cast<float>(e);
  float y = f * z * p;
  y = fused(k, -2.12194440e-4f, y);
  y = fused(-0.5f, z, y);
  return fused(k, 0.693359375f, f + y);
}

BVAE_HD float square_root(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // within 1 ulp; exact rounding takes a dozen instructions more
  return y;
#else
  return sqrtf(x);
#endif
}

// sin and cos of w turns / 2^32. The quadrant comes off the integer, so that the reduction is exact.
BVAE_HD void sincos_word(uint32_t w, float* s, float* c) {
  const uint32_t quadrant = (w + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(w - (quadrant << 30));
  const float x = static_cast<float>(rest) * 1.46291807926715968e-9f;  // pi / 2^31
  const float z = x * x;
  float p = -1.9515295891e-4f;  // Cephes sinf, cosf
  p = fused(p, z, 8.3321608736e-3f);
  p = fused(p, z, -1.6666654611e-1f);
  const float sine = fused(p * z, x, x);
  float q = 2.443315711809948e-5f;
  q = fused(q, z, -1.388731625493765e-3f);
  q = fused(q, z, 4.166664568298827e-2f);
  const float cosine = fused(q * z, z, fused(-0.5f, z, 1.0f));
  const bool swap = (quadrant & 1u) != 0;
  const float a = swap ? cosine : sine;
  const float b = swap ? sine : cosine;
  *s = float_of(bits_of(a) ^ ((quadrant & 2u) << 30));
  *c = float_of(bits_of(b) ^ (((quadrant + 1u) & 2u) << 30));
}

// ---- the loss ------------------------------------------------------------------------------------------------------

// d = x_hat - x, with x_hat = sigmoid(recon) for logits.
template <bool logits, class A>
BVAE_HD A residual(A recon, A target) {
  if constexpr (logits) {
    return sigmoid(recon) - target;
  } else {
    return recon - target;
  }
}

// d (x_hat - x)^2 / d recon, halved: the coefficient the caller multiplies with carries the 2. 1 - x_hat is
// e^-x x_hat, which keeps its digits where x_hat is close to 1.
template <bool logits, class A>
BVAE_HD A half_slope(A recon, A target) {
  if constexpr (logits) {
    const A t = exp_bounded(-recon);
    const A x_hat = reciprocal(A(1) + t);
    return (x_hat - target) * (t * x_hat * x_hat);
  } else {
    return recon - target;
  }
}

// d (g_loss * loss + g_sse * sse) / d recon = coefficient * half_slope.
BVAE_HD double loss_coefficient(double g_loss, double g_sse, double gamma2, double batch) {
  return g_loss / (gamma2 * batch) + 2.0 * g_sse;
}

// max(floor, min(gamma2, decay gamma2 + (1 - decay) mse)); a non-finite mse is refused. A gamma2 that is
// NaN stays NaN: the floor would turn it into a huge weight of the reconstruction.
BVAE_HD bool move_gamma2(float* gamma2, double mse, double decay, double floor) {
  if (!(mse - mse == 0.0)) return false;
  const double now = *gamma2;
  const double mixed = decay * now + (1.0 - decay) * mse;
  const double low = mixed < now ? mixed : now;
  *gamma2 = static_cast<float>(low < floor ? floor : low);
  return true;
}

struct LossParts {
  double loss, nll, mse, kl_mean;
};

// loss = sse / (2 B gamma2) + kl_weight kl / B + D/2 log gamma2 + D/2 log 2 pi, from the gamma2 before this step.
BVAE_HD LossParts loss_parts(double sse, double kl, double gamma2, double kl_weight, int64_t batch, int64_t numel,
                             int64_t per_sample) {
  const double constant = 0.5 * static_cast<double>(per_sample) * (log(gamma2) + 1.8378770664093454836);
  LossParts p;
  p.kl_mean = batch > 0 ? kl / static_cast<double>(batch) : 0.0;
  p.mse = numel > 0 ? sse / static_cast<double>(numel) : 0.0;
  p.nll = (batch > 0 ? sse / (2.0 * static_cast<double>(batch) * gamma2) : 0.0) + constant;
  p.loss = p.nll + kl_weight * p.kl_mean;
  return p;
}

// ---- sampling and KL -----------------------------------------------------------------------------------------------

template <class A>
struct Latent {
  A z, sigma2, kl;
};

template <class A>
BVAE_HD Latent<A> sample_latent(A mu, A log_sigma, A eps) {
  A sigma, m;
  exp_and_expm1(log_sigma, &sigma, &m);
  const A excess = m * (m + A(2));  // sigma^2 - 1
  Latent<A> out;
  out.z = mu + sigma * eps;
  out.sigma2 = sigma * sigma;
  out.kl = A(0.5) * (mu * mu + (excess - A(2) * log_sigma));
  return out;
}

template <class A>
BVAE_HD void latent_gradient(A mu, A log_sigma, A eps, A g_z, A g_kl, A* g_mu, A* g_log_sigma) {
  A sigma, m;
  exp_and_expm1(log_sigma, &sigma, &m);
  *g_mu = g_z + g_kl * mu;
  *g_log_sigma = g_z * (sigma * eps) + g_kl * (m * (m + A(2)));
}

}  // namespace bvae
