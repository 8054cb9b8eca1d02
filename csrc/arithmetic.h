// Arithmetic for one element, shared by the CPU loops and the CUDA kernels.
//
// The float functions are branch-free polynomials, so that a compiler vectorises a loop over them. On machines with
// fused multiply-add (every GPU, AVX2, AVX-512, NEON) they give the same bits everywhere; the build switches off
// the compiler's own contraction. They are written for few instructions: on a GPU, sampling is as much a matter of
// arithmetic as of memory (docs/lab/throughput.md). Largest errors, in units in the last place: sigma 1.2, sigma^2 - 1 1.5
// near collapse and 3.4 elsewhere, the logarithm 1, sine and cosine 2.4; tests/test_ops.py and test_ops_noise.py check
// what is made of them. The double functions call libm: they serve gradcheck, not speed.
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

BVAE_HD double fused(double a, double b, double c) { return a * b + c; }

// sum + d^2, in one instruction where there is one.
BVAE_HD float add_square(float d, float sum) { return fused(d, d, sum); }
BVAE_HD double add_square(double d, double sum) { return fused(d, d, sum); }

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

// x = n ln 2 + r with |r| <= ln 2 / 2; *scale is the float whose exponent field is n + bias: 2^n for a bias of 127, and
// 0 where the field is 0. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits: no conversion
// instruction, the exponent field is one shift away, and a NaN stays a NaN in r.
template <int bias>
BVAE_HD float split_exp(float x, float* scale) {
  constexpr float shifter = 12582912.0f + bias;
  const float t = fused(x, 1.44269504088896341f, shifter);
  *scale = float_of(bits_of(t) << 23);
  const float k = t - shifter;
  return fused(k, -1.42860677e-6f, fused(k, -0.693145752f, x));  // ln 2 in two parts
}

// e^r - 1 on |r| <= ln 2 / 2, within 2^-26 of it before rounding: minimax, the constant term rounded to 1/2.
BVAE_HD float expm1_reduced(float r) {
  float p = 1.38706563e-3f;
  p = fused(p, r, 8.36626161e-3f);
  p = fused(p, r, 4.16674353e-2f);
  p = fused(p, r, 1.66665465e-1f);
  p = fused(p, r, 4.99999970e-1f);
  return fused(p * r, r, r);
}

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
  float scale;
  const float q = expm1_reduced(split_exp<127>(x, &scale));
  return fused(q, scale, scale);
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

// sigma = e^l and (sigma^2 - 1) / 4 from one reduction. With h = (e^l - 1) / 2 the latter is h^2 + h, which keeps its
// digits near collapse, where l is close to 0 and e^(2l) - 1 would cancel. Half of e^l, because 2^n leaves the range of
// floats before e^l does. Below e^-87, sigma is 0.
BVAE_HD void sigma_and_excess(float l, float* sigma, float* quarter_excess) {
  l = l > 89.0f ? 89.0f : l;  // e^89 is infinite
  l = l < -87.3f ? -87.3f : l;
  float half;
  const float q = expm1_reduced(split_exp<126>(l, &half));
  const float half_sigma = fused(q, half, half);
  const float h = fused(q, half, half - 0.5f);
  *sigma = half_sigma + half_sigma;
  *quarter_excess = fused(h, h, h);
}

BVAE_HD void sigma_and_excess(double l, double* sigma, double* quarter_excess) {
  *sigma = exp(l);
  const double h = 0.5 * expm1(l);
  *quarter_excess = h * h + h;
}

// -2 ln u for u in (0, 1], normal numbers only: u = 2^k m with m in [2/3, 4/3), and of g = 2 - 2 m, which is exact,
// -2 ln m = g + g^2 p(g).
BVAE_HD float minus_two_log(float u) {
  const uint32_t exponent = (bits_of(u) - 0x3f2aaaabu) & 0xff800000u;  // k 2^23
  const float g = fused(float_of(bits_of(u) - exponent), -2.0f, 2.0f);
  float p = 5.47679025e-4f;  // minimax, within 2^-25 of the logarithm
  p = fused(p, g, 1.20184361e-3f);
  p = fused(p, g, 2.18705228e-3f);
  p = fused(p, g, 5.13032172e-3f);
  p = fused(p, g, 1.25069208e-2f);
  p = fused(p, g, 3.12596858e-2f);
  p = fused(p, g, 8.33330005e-2f);
  p = fused(p, g, 2.49999687e-1f);
  const float k = static_cast<float>(static_cast<int32_t>(exponent));
  return fused(k, -1.65259166e-7f, fused(g * g, p, g));  // -2 ln 2 / 2^23, in float within 2^-28
}

BVAE_HD float square_root(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // within 1 ulp; exact rounding takes a dozen instructions
  return y;
#else
  return sqrtf(x);
#endif
}

// r sin and r cos of w turns / 2^32. The quadrant comes off the integer, so that the reduction is exact; what remains
// is x eighths of a turn, x in [-1, 1]. The sign that both share goes into r.
BVAE_HD void polar(float r, uint32_t w, float* r_sin, float* r_cos) {
  const uint32_t shifted = w + 0x20000000u;  // the quadrant in its two highest bits
  const float x = static_cast<float>(static_cast<int32_t>(w << 2)) * 4.65661287307739258e-10f;  // 2^-31
  const float z = x * x;
  float p = -3.66088425e-5f;  // minimax, within 2^-25 of sin and 2^-31 of cos
  p = fused(p, z, 2.49101617e-3f);
  p = fused(p, z, -8.07458311e-2f);
  const float sine = x * fused(p, z, 7.85398185e-1f);
  float q = 3.49408742e-6f;
  q = fused(q, z, -3.25868692e-4f);
  q = fused(q, z, 1.58542842e-2f);
  q = fused(q, z, -3.08425128e-1f);
  const float cosine = fused(q, z, 1.0f);
  const bool swap = static_cast<int32_t>(shifted << 1) < 0;
  const float signed_r = float_of(bits_of(r) ^ (shifted & 0x80000000u));
  *r_sin = signed_r * (swap ? cosine : sine);
  *r_cos = signed_r * (swap ? -sine : cosine);
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

// The gamma2 that a loss uses: 0 stands for one that has not started, and then it is the batch's own mse.
BVAE_HD float gamma2_in_use(float gamma2, double mse, double floor) {
  if (gamma2 != 0.0f) return gamma2;
  return static_cast<float>(mse < floor ? floor : mse);
}

// max(floor, decay gamma2 + (1 - decay) mse), where `monotone` no larger than gamma2; from 0, which has not started,
// max(floor, mse). A non-finite mse is refused. A gamma2 that is NaN stays NaN: the floor would turn it into a huge
// weight of the reconstruction.
BVAE_HD bool move_gamma2(float* gamma2, double mse, double decay, double floor, bool monotone) {
  if (!(mse - mse == 0.0)) return false;
  const double now = *gamma2;
  double next = now == 0.0 ? mse : decay * now + (1.0 - decay) * mse;
  if (monotone && now != 0.0 && !(next < now)) next = now;
  *gamma2 = static_cast<float>(next < floor ? floor : next);
  return true;
}

struct LossParts {
  double loss, nll, mse, kl_mean;
};

// loss = sse / (2 B gamma2) + kl_weight kl / B + D/2 log gamma2 + D/2 log 2 pi, with the gamma2 and weight in use.
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

// What a loss reads beside the batch, and moves.
struct LossState {
  float* gamma2;
  int64_t* skipped;
  const float* weight;  // multiplies kl_weight, or null
  double kl_weight, decay, floor;
  bool update, monotone;
};

// The loss of a batch from its sums. Writes stats [4] and used [2], the gamma2 and weight that the gradient needs, and
// then moves gamma2.
BVAE_HD LossParts finish_loss(double sse, double kl, int64_t batch, int64_t numel, int64_t per_sample,
                              const LossState& state, float* stats, float* used) {
  const double mse = numel > 0 ? sse / static_cast<double>(numel) : 0.0;
  float gamma2 = *state.gamma2;
  used[0] = gamma2_in_use(gamma2, mse, state.floor);
  used[1] = state.weight != nullptr ? *state.weight : 1.0f;
  const LossParts parts = loss_parts(sse, kl, used[0], state.kl_weight * used[1], batch, numel, per_sample);
  stats[0] = static_cast<float>(parts.mse);
  stats[1] = static_cast<float>(parts.kl_mean);
  stats[2] = used[0];
  stats[3] = static_cast<float>(parts.nll);
  if (state.update && numel > 0) {
    if (move_gamma2(&gamma2, parts.mse, state.decay, state.floor, state.monotone)) {
      *state.gamma2 = gamma2;
    } else {
      *state.skipped += 1;
    }
  }
  return parts;
}

// d (g_loss * loss) / d kl.
BVAE_HD double kl_coefficient(double g_loss, double kl_weight, double weight, int64_t batch) {
  return batch > 0 ? g_loss * kl_weight * weight / static_cast<double>(batch) : 0.0;
}

// ---- sampling and KL -----------------------------------------------------------------------------------------------

// z, sigma, and rest = (sigma^2 - 1) / 2 - log sigma: what a latent's KL has besides mu^2 / 2, which the caller adds
// once to a whole sum.
template <class A>
struct Latent {
  A z, sigma, rest;
};

template <class A>
BVAE_HD Latent<A> sample_latent(A mu, A log_sigma, A eps) {
  Latent<A> out;
  A quarter_excess;
  sigma_and_excess(log_sigma, &out.sigma, &quarter_excess);
  out.z = fused(out.sigma, eps, mu);
  out.rest = fused(A(2), quarter_excess, -log_sigma);
  return out;
}

template <class A>
BVAE_HD void latent_gradient(A mu, A log_sigma, A eps, A g_z, A g_kl, A* g_mu, A* g_log_sigma) {
  A sigma, quarter_excess;
  sigma_and_excess(log_sigma, &sigma, &quarter_excess);
  *g_mu = fused(g_kl, mu, g_z);
  *g_log_sigma = fused(g_z, sigma * eps, (A(4) * g_kl) * quarter_excess);
}

// ---- batch norm with ReLU ------------------------------------------------------------------------------------------

// Mean and variance of a channel from the sums of x - origin and of its square over n pixels.
struct ChannelMoments {
  double mean, var;
};

BVAE_HD ChannelMoments channel_moments(double origin, double sum, double sum_of_squares, double n) {
  const double offset = sum / n;
  const double spread = sum_of_squares / n - offset * offset;
  // Not max(0, spread), which would be 0 for a NaN: what is not finite must stay so.
  return {origin + offset, spread < 0.0 ? 0.0 : spread};
}

BVAE_HD float inverse_deviation(double var, double eps) { return static_cast<float>(1.0 / sqrt(var + eps)); }

// A running statistic after the batch's `next`.
BVAE_HD float mixed(float now, double next, double momentum) {
  return static_cast<float>((1.0 - momentum) * now + momentum * next);
}

BVAE_HD double unbiased(double var, double n) { return var * (n / (n - 1.0)); }

// With d = x - mean and scale = weight / deviation.
BVAE_HD float normalised(float d, float scale, float bias) { return d * scale + bias; }

BVAE_HD float relu(float t) { return t < 0.0f ? 0.0f : t; }  // NaN stays

// The gradient behind a ReLU that gave y. As PyTorch has it, a NaN lets it through.
BVAE_HD float relu_gradient(float grad, float y) { return y <= 0.0f ? 0.0f : grad; }

// The part of the gradient that the ReLU of a norm let through.
BVAE_HD float passed_by_relu(float grad, float d, float scale, float bias) {
  return normalised(d, scale, bias) > 0.0f ? grad : 0.0f;
}

// A channel's gradients from the sums of the gradient g that the ReLU let through and of g d:
// grad_x = scale (g - mean(g) - xhat mean(g xhat)) = scale g - slope d - constant, with xhat = d / deviation.
struct NormGradient {
  float weight, bias, slope, constant;
};

BVAE_HD NormGradient norm_gradient(double sum, double sum_with_d, float scale, float invstd, double n) {
  NormGradient out;
  out.bias = static_cast<float>(sum);
  out.weight = static_cast<float>(sum_with_d * invstd);
  out.slope = static_cast<float>(scale * invstd * invstd * sum_with_d / n);
  out.constant = static_cast<float>(scale * sum / n);
  return out;
}

BVAE_HD float norm_gradient_of_x(float passed, float d, float scale, float slope, float constant) {
  return scale * passed - slope * d - constant;
}

}  // namespace bvae
