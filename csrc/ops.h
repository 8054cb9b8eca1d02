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

// On the CPU only.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   Tensor running_mean, Tensor running_var, double momentum,
                                                   double eps);
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& invstd);

}  // namespace bvae
