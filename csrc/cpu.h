// The CPU loops as a table of functions: cpu_loops.h is compiled once per instruction set and the best set that the
// processor has is chosen when the extension loads. Every function works on a range, so that the caller can split
// the work over threads; none allocates.
#pragma once

#include "common.h"

namespace bvae {

// Not from adam.h: cpu_loops.h includes the arithmetic once its instruction set is chosen, and must be the first to.
struct AdamFactors;
struct AdamCorrections;

struct CpuLoops {
  const char* name;

  // Sum of squared residuals over the elements [begin, end).
  double (*sse)(DType recon_type, const void* recon, DType target_type, const void* target, bool logits, int64_t begin,
                int64_t end);

  // grad[i] = coefficient * half_slope(recon[i], target[i]) over [begin, end); grad has recon's type.
  void (*sse_grad)(DType recon_type, const void* recon, DType target_type, const void* target, bool logits,
                   double coefficient, void* grad, int64_t begin, int64_t end);

  // z for rows [begin, end), and per-latent sums of mu, mu^2, sigma^2, kl over those rows added to sums [4, k].
  void (*sample)(DType type, Rows mu, Rows log_sigma, void* z, double* sums, int64_t k, RngState rng,
                 int64_t first_sample, int64_t begin, int64_t end);

  // grad_z and grad_kl may be null (no gradient reaches z or kl). grad_kl is one number of the arithmetic type, or where
  // `per_latent` k of them.
  void (*sample_grad)(DType type, const void* grad_z, const void* grad_kl, bool per_latent, Rows mu, Rows log_sigma,
                      void* grad_mu, void* grad_log_sigma, int64_t k, RngState rng, int64_t first_sample, int64_t begin,
                      int64_t end);

  // Rows [begin, end) of the raw words (as int64) or of the normals; the other pointer is null.
  void (*noise)(int64_t* words, float* normals, int64_t k, RngState rng, int64_t first_sample, int64_t begin,
                int64_t end);

  // Images [begin, end): rows = data[index], mirrored along the width where flip says so; x = rows / 255.
  void (*gather)(const uint8_t* data, const int64_t* index, const bool* flip, DType type, void* x, uint8_t* rows,
                 int64_t height, int64_t width, int64_t channels, int64_t begin, int64_t end);

  // Batch norm with ReLU over rows [begin, end) of x [rows, channels]; per-channel numbers are float.
  void (*widen)(DType type, const void* x, float* out, int64_t n);
  // Adds the sums of x - origin and of its square to sums [2, channels].
  void (*moments)(DType type, const void* x, const float* origin, double* sums, int64_t channels, int64_t begin,
                  int64_t end);
  // y = max(0, t), t = scale (x - mean) + bias
  void (*scale_relu)(DType type, const void* x, const float* mean, const float* scale, const float* bias, void* y,
                     int64_t channels, int64_t begin, int64_t end);
  // Adds the sums of g and of g (x - mean) to sums [2, channels], where g is grad where t > 0, else 0.
  void (*gradient_moments)(DType type, const void* grad, const void* x, const float* mean, const float* scale,
                           const float* bias, double* sums, int64_t channels, int64_t begin, int64_t end);
  // grad_x = scale g - slope (x - mean) - constant + more; `more` may be null.
  void (*scale_relu_grad)(DType type, const void* grad, const void* x, const float* mean, const float* scale,
                          const float* bias, const float* slope, const float* constant, const void* more, void* grad_x,
                          int64_t channels, int64_t begin, int64_t end);
  // out = a + b + bias; b may be null.
  void (*add_biased)(DType type, const void* a, const void* b, const float* bias, void* out, int64_t channels,
                     int64_t begin, int64_t end);

  // out = the part of grad that a ReLU let through which gave y.
  void (*relu_grad)(DType type, const void* grad, const void* y, void* out, int64_t begin, int64_t end);

  // The largest magnitude (see adam.h) of the elements [begin, end); 0 of none.
  int32_t (*largest_magnitude)(DType type, const void* data, int64_t begin, int64_t end);
  // Adam on the elements [begin, end). `half`, if not null, becomes a bf16 copy of the parameters.
  void (*adam)(AdamFactors factors, AdamCorrections corrections, DType type, const void* grad, float* parameter,
               float* exp_avg, float* exp_avg_sq, uint16_t* half, int64_t begin, int64_t end);
};

const CpuLoops& cpu_loops();

}  // namespace bvae
