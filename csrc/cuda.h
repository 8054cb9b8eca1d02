// Launchers of the CUDA kernels, free of torch and CUDA headers so that both compilers read them. Each takes raw device
// pointers, a device index and a stream, never synchronises, and returns the cudaError_t of its launch as an int.
#pragma once

#include "adam.h"
#include "step.h"

namespace bvae {

struct Launch {
  int device;
  int multiprocessors;
  void* stream;
};

const char* cuda_error_string(int error);

// Writes how many multiprocessors the device has.
int cuda_multiprocessors(int device, int* count);

// Bytes of scratch memory a call needs for its partial sums and its ticket. Scratch is per call: with a global ticket,
// two streams or two replays of a graph would race.
int64_t sample_kl_scratch_bytes(int64_t batch, int64_t k, Launch launch);
int64_t balanced_loss_scratch_bytes(int64_t numel, Launch launch);

struct SampleArgs {
  DType type;
  Rows mu, log_sigma;  // [B, k]
  void* z;             // [B, k]
  void* kl;            // scalar, float or double
  void* moments;       // [4, k], float or double
  int64_t* rng;        // {seed, offset}, advanced by the last block
  int64_t* state;      // {seed, offset} as the noise used it
  void* scratch;
  int64_t batch, k, first_sample;
  bool advance;
};
int cuda_sample_kl(const SampleArgs& args, Launch launch);

struct SampleGradArgs {
  DType type;
  const void* grad_z;   // [B, k] or null
  const void* grad_kl;  // scalar, or where `per_latent` [k], or null
  Rows mu, log_sigma;   // [B, k]
  const int64_t* state;
  void *grad_mu, *grad_log_sigma;  // [B, k]
  int64_t batch, k, first_sample;
  bool per_latent;
};
int cuda_sample_kl_backward(const SampleGradArgs& args, Launch launch);

// Exactly one of words and normals is not null; [rows, k].
int cuda_noise(int64_t* words, float* normals, const int64_t* rng, int64_t rows, int64_t k, int64_t first_sample,
               Launch launch);

struct LossArgs {
  DType recon_type, target_type;
  const void *recon, *target;  // numel elements in the same order
  const void* kl;              // scalar, float or double
  LossState state;
  void *loss, *sse;  // scalars, float or double
  float* stats;      // [4]
  float* used;       // [2]: gamma2 and weight
  void* scratch;
  int64_t numel, batch, per_sample;
  bool logits;
};
int cuda_balanced_loss(const LossArgs& args, Launch launch);

struct LossGradArgs {
  DType recon_type, target_type;
  const void *grad_loss, *grad_sse;  // scalars, float or double, or null
  const void *recon, *target;
  const float* used;  // [2]: gamma2 and weight
  void* grad_recon;
  void* grad_kl;  // scalar, float or double
  int64_t numel, batch;
  double kl_weight;
  bool logits;
};
int cuda_balanced_loss_backward(const LossGradArgs& args, Launch launch);

int cuda_update_gamma2(float* gamma2, int64_t* skipped, const void* sse, bool sse_is_double, const void* count,
                       bool count_is_double, double decay, double floor, bool monotone, Launch launch);

// Images of batch norm are [rows, channels]: float, bf16 or f16. `counters` [C] are 0, and so they are left.
int64_t batch_norm_scratch_bytes(int64_t rows, int64_t channels, Launch launch);

struct NormArgs {
  DType type;
  const void* x;
  const float *offset, *weight, *bias;  // [C]; offset may be null
  float *running_mean, *running_var;    // [C]
  float* running_weight;                // scalar
  unsigned int* counters;
  void* y;
  void* through;      // x + offset, or null
  float* statistics;  // mean and 1 / deviation, [2, C]
  void* scratch;
  int64_t rows, channels;
  double momentum, eps;
};
int cuda_batch_norm_relu(const NormArgs& args, Launch launch);

struct NormGradArgs {
  DType type;
  const void *grad, *grad_through;  // of y, of `through`; the latter may be null
  const void* x;
  const float *weight, *bias;  // [C]
  const float* statistics;     // [2, C]
  unsigned int* counters;
  void* grad_x;
  float *grad_weight, *grad_bias, *grad_offset;  // [C]; the last is null where it is not wanted
  void* scratch;
  int64_t rows, channels;
};
int cuda_batch_norm_relu_backward(const NormGradArgs& args, Launch launch);

struct AddArgs {
  DType type;
  const void *a, *b;
  const float *bias_a, *bias_b;  // [C]
  void* out;
  int64_t rows, channels;
};
int cuda_add_biased(const AddArgs& args, Launch launch);

struct ChannelSumArgs {
  DType type;
  const void* x;
  unsigned int* counters;
  float *sums, *again;  // [C], alike
  void* scratch;
  int64_t rows, channels;
};
int cuda_channel_sums(const ChannelSumArgs& args, Launch launch);

struct ReluGradArgs {
  DType type;
  const void *grad, *y;  // [rows, C]
  unsigned int* counters;
  void *out, *sums;  // [rows, C], [C]
  void* scratch;
  int64_t rows, channels;
};
int cuda_relu_grad(const ReluGradArgs& args, Launch launch);

struct GatherArgs {
  const uint8_t* data;   // [N, H, W, C]
  const int64_t* index;  // [B]
  const bool* flip;      // [B] or null
  DType type;
  void* x;        // [B, H, W, C]
  uint8_t* rows;  // [B, H, W, C]
  int64_t images, batch, height, width, channels;
};
int cuda_gather(const GatherArgs& args, Launch launch);

// Memory that two tensors occupy.
struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};
int cuda_copy_all(const Copy* copies, int64_t count, Launch launch);
// Adds a good step's figures to their sums; of another counts it and makes the copies.
int cuda_end_step(const StepFigures& figures, const Copy* undo, int64_t count, Launch launch);

struct Elements {
  DType type;  // not f64
  const void* data;
  int64_t numel;
};
// Writes whether all elements are below 2^64 in size.
int cuda_all_finite(const Elements* tensors, int64_t count, bool* finite, Launch launch);

struct AdamTensor {
  DType type;  // of grad, not f64
  const void* grad;
  float *parameter, *exp_avg, *exp_avg_sq;
  uint16_t* half;  // bf16, or null
  int64_t numel;
  int slot;                     // its place in `steps`
  AdamCorrections corrections;  // on the CPU; kernels read them from AdamArgs
};
struct AdamArgs {
  const AdamTensor* tensors;  // on the host, and read before the launcher returns
  int64_t count;
  float* steps;
  const bool* good;
  const float* lr;
  double beta1, beta2;
  AdamFactors factors;
  AdamCorrections* corrections;  // [count], scratch memory
};
int cuda_adam(const AdamArgs& args, Launch launch);

}  // namespace bvae
