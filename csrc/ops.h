// The raw operators behind bvae/ops.py; ops.cpp holds their schemas. Each runs on the CPU and on CUDA.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bvae {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_kl(const Tensor& mu, const Tensor& log_sigma, Tensor rng,
                                                     int64_t first_sample, bool advance);
std::tuple<Tensor, Tensor> sample_kl_backward(const std::optional<Tensor>& grad_z,
                                              const std::optional<Tensor>& grad_kl, const Tensor& mu,
                                              const Tensor& log_sigma, const Tensor& state, int64_t first_sample);
Tensor philox_words(const Tensor& rng, int64_t rows, int64_t k, int64_t first_sample);
Tensor philox_normal(const Tensor& rng, int64_t rows, int64_t k, int64_t first_sample);

std::tuple<Tensor, Tensor, Tensor, Tensor> balanced_loss(const Tensor& recon, const Tensor& target, const Tensor& kl,
                                                         Tensor gamma2, Tensor skipped,
                                                         const std::optional<Tensor>& weight, double kl_weight,
                                                         bool logits, bool update, double decay, double floor,
                                                         bool monotone);
std::tuple<Tensor, Tensor> balanced_loss_backward(const std::optional<Tensor>& grad_loss,
                                                  const std::optional<Tensor>& grad_sse, const Tensor& recon,
                                                  const Tensor& target, const Tensor& used, double kl_weight,
                                                  bool logits);
void update_gamma2(Tensor gamma2, Tensor skipped, const Tensor& sse, const Tensor& count, double decay, double floor,
                   bool monotone);

std::tuple<Tensor, Tensor> gather(const Tensor& data, const Tensor& index, const std::optional<Tensor>& flip,
                                  ScalarType dtype);

Tensor all_finite(const std::vector<Tensor>& tensors);
// halves[j] is the copy of parameters[halved[j]]: for what an op writes, torch.compile takes no list with gaps.
void adam(const std::vector<Tensor>& parameters, const std::vector<std::optional<Tensor>>& grads,
          const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
          const std::vector<Tensor>& halves, const std::vector<int64_t>& halved, Tensor steps, const Tensor& good,
          const Tensor& lr, double beta1, double beta2, double eps);

void copy_all(const std::vector<Tensor>& to, const std::vector<Tensor>& from);
void end_step(const Tensor& good, const Tensor& parts, const std::optional<Tensor>& moments,
              Tensor sum_parts, Tensor sum_moments, Tensor counts, Tensor trouble, const std::vector<Tensor>& state,
              const std::vector<Tensor>& kept);

// `counters` int32 [C], 0 before and after, which two streams must not share: kernels count their blocks in them.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const std::optional<Tensor>& offset,
                                                   const Tensor& weight, const Tensor& bias, Tensor running_mean,
                                                   Tensor running_var, Tensor running_weight, Tensor counters,
                                                   double momentum, double eps, bool through);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_through, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& statistics, Tensor counters, bool offset_gradient);
Tensor add_biased(const Tensor& a, const Tensor& b, const Tensor& bias_a, const Tensor& bias_b);
// The sums twice, as the gradients of two biases that are added to one image.
std::tuple<Tensor, Tensor> channel_sums(const Tensor& x, Tensor counters);

std::tuple<Tensor, Tensor> relu_grad(const Tensor& grad, const Tensor& y, Tensor counters);

}  // namespace bvae
