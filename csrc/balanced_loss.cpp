// The reconstruction loss and gamma2: checks, memory layouts, the CPU's threads.
#include "ops.h"

namespace bvae {
namespace {

constexpr int64_t kChunk = 16384;  // elements; fixed, so that sums do not depend on the number of threads

// Reconstruction and target as two runs of memory in the same order.
struct Pair {
  Tensor recon, target;
  DType recon_type, target_type;
};

Pair line_up(const Tensor& recon, const Tensor& target) {
  STD_TORCH_CHECK(recon.dim() >= 1 && same_sizes(recon, target),
                  "bvae: the reconstruction and its target must have one shape [B, ...]");
  check_same_device(recon, target, "the reconstruction", "its target");
  Pair p{recon, target, dtype_of(recon, "the reconstruction"), dtype_of(target, "the target", true)};
  if (!is_dense(recon)) p.recon = torch::stable::clone(recon);
  // The kernels read uint8, the reconstruction's own type and the type of the sums; anything else is converted.
  const bool readable = p.target_type == DType::u8 || p.target_type == p.recon_type ||
                        target.scalar_type() == sum_type(p.recon_type);
  if (readable && same_strides(p.recon, target)) return p;
  const ScalarType type = readable ? target.scalar_type() : sum_type(p.recon_type);
  const auto sizes = p.recon.sizes(), strides = p.recon.strides();
  Tensor copy = empty_strided(recon, sizes.data(), strides.data(), p.recon.dim(), type);
  torch::stable::copy_(copy, target);
  p.target = copy;
  p.target_type = dtype_of(copy, "the target", true);
  return p;
}

int64_t per_sample(const Tensor& recon) {
  int64_t d = 1;
  for (int64_t i = 1; i < recon.dim(); ++i) d *= recon.size(i);
  return d;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> balanced_loss(const Tensor& recon, const Tensor& target, const Tensor& kl,
                                                         Tensor gamma2, Tensor skipped,
                                                         const std::optional<Tensor>& weight, double kl_weight,
                                                         bool logits, bool update, double decay, double floor,
                                                         bool monotone) {
  const Pair p = line_up(recon, target);
  const ScalarType sums = sum_type(p.recon_type);
  check_scalar(kl, sums, "kl");
  check_scalar(gamma2, ScalarType::Float, "gamma2");
  check_scalar(skipped, ScalarType::Long, "skipped");
  check_same_device(recon, kl, "the reconstruction", "kl");
  check_same_device(recon, gamma2, "the reconstruction", "gamma2");
  check_same_device(recon, skipped, "the reconstruction", "skipped");
  if (weight.has_value()) {
    check_scalar(*weight, ScalarType::Float, "weight");
    check_same_device(recon, *weight, "the reconstruction", "weight");
  }
  const int64_t numel = recon.numel(), batch = recon.size(0), d = per_sample(recon);
  Tensor loss = empty_scalar(recon, sums), sse = empty_scalar(recon, sums);
  Tensor stats = empty(recon, {4}, ScalarType::Float), used = empty(recon, {2}, ScalarType::Float);
  const LossState state{static_cast<float*>(gamma2.mutable_data_ptr()),
                        static_cast<int64_t*>(skipped.mutable_data_ptr()),
                        static_cast<const float*>(optional_data(weight)),
                        kl_weight,
                        decay,
                        floor,
                        update,
                        monotone};
  float* stats_data = static_cast<float*>(stats.mutable_data_ptr());
  float* used_data = static_cast<float*>(used.mutable_data_ptr());
  const void* r = p.recon.const_data_ptr();
  const void* t = p.target.const_data_ptr();

  if (runs_on_cpu(recon)) {
    const int64_t chunks = (numel + kChunk - 1) / kChunk;
    std::vector<double> partial(chunks, 0.0);
    torch::stable::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        partial[c] = cpu_loops().sse(p.recon_type, r, p.target_type, t, logits, c * kChunk,
                                     std::min((c + 1) * kChunk, numel));
      }
    });
    double total = 0.0;
    for (const double x : partial) total += x;
    const LossParts parts = finish_loss(total, scalar_value(kl), batch, numel, d, state, stats_data, used_data);
    set_scalar(loss, parts.loss);
    set_scalar(sse, total);
  } else {
    on_cuda(recon, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(recon, {balanced_loss_scratch_bytes(numel, launch)}, ScalarType::Byte);
      return cuda_balanced_loss(
          {p.recon_type, p.target_type, r, t, kl.const_data_ptr(), state, loss.mutable_data_ptr(),
           sse.mutable_data_ptr(), stats_data, used_data, scratch.mutable_data_ptr(), numel, batch, d, logits},
          launch);
#endif
    });
  }
  return {loss, sse, stats, used};
}

std::tuple<Tensor, Tensor> balanced_loss_backward(const std::optional<Tensor>& grad_loss,
                                                  const std::optional<Tensor>& grad_sse, const Tensor& recon,
                                                  const Tensor& target, const Tensor& used, double kl_weight,
                                                  bool logits) {
  const Pair p = line_up(recon, target);
  const ScalarType sums = sum_type(p.recon_type);
  STD_TORCH_CHECK(used.scalar_type() == ScalarType::Float && used.numel() == 2 && used.is_contiguous(),
                  "bvae: used must be the float32 [2] that balanced_loss returned");
  check_same_device(recon, used, "the reconstruction", "used");
  for (const auto* g : {&grad_loss, &grad_sse}) {
    if (!g->has_value()) continue;
    check_scalar(**g, sums, "the gradient of loss or sse");
    check_same_device(recon, **g, "the reconstruction", "the gradient");
  }
  const int64_t numel = recon.numel(), batch = recon.size(0);
  const auto sizes = p.recon.sizes(), strides = p.recon.strides();
  Tensor grad = empty_strided(recon, sizes.data(), strides.data(), recon.dim(), recon.scalar_type());
  Tensor grad_kl = empty_scalar(recon, sums);
  const void* r = p.recon.const_data_ptr();
  const void* t = p.target.const_data_ptr();
  const float* used_data = static_cast<const float*>(used.const_data_ptr());
  void* g = grad.mutable_data_ptr();

  if (runs_on_cpu(recon)) {
    const double g_loss = grad_loss.has_value() ? scalar_value(*grad_loss) : 0.0;
    const double g_sse = grad_sse.has_value() ? scalar_value(*grad_sse) : 0.0;
    const double coefficient = loss_coefficient(g_loss, g_sse, used_data[0], static_cast<double>(batch));
    const int64_t chunks = (numel + kChunk - 1) / kChunk;
    torch::stable::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
      cpu_loops().sse_grad(p.recon_type, r, p.target_type, t, logits, coefficient, g, begin * kChunk,
                           std::min(end * kChunk, numel));
    });
    set_scalar(grad_kl, kl_coefficient(g_loss, kl_weight, used_data[1], batch));
  } else {
    on_cuda(recon, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_balanced_loss_backward(
          {p.recon_type, p.target_type, optional_data(grad_loss), optional_data(grad_sse), r, t, used_data, g,
           grad_kl.mutable_data_ptr(), numel, batch, kl_weight, logits},
          launch);
#endif
    });
  }
  return {grad, grad_kl};
}

void update_gamma2(Tensor gamma2, Tensor skipped, const Tensor& sse, const Tensor& count, double decay, double floor,
                   bool monotone) {
  check_scalar(gamma2, ScalarType::Float, "gamma2");
  check_scalar(skipped, ScalarType::Long, "skipped");
  STD_TORCH_CHECK(sse.numel() == 1 && (dtype_of(sse, "sse") == DType::f32 || dtype_of(sse, "sse") == DType::f64),
                  "bvae: sse must be one float32 or float64 element");
  const bool count_is_double = count.scalar_type() == ScalarType::Double;
  check_scalar(count, count_is_double ? ScalarType::Double : ScalarType::Long, "count");
  check_same_device(gamma2, skipped, "gamma2", "skipped");
  check_same_device(gamma2, sse, "gamma2", "sse");
  check_same_device(gamma2, count, "gamma2", "count");
  float* gamma2_data = static_cast<float*>(gamma2.mutable_data_ptr());
  int64_t* skipped_data = static_cast<int64_t*>(skipped.mutable_data_ptr());
  if (runs_on_cpu(gamma2)) {
    const double n = count_is_double ? scalar_value(count)
                                     : static_cast<double>(*static_cast<const int64_t*>(count.const_data_ptr()));
    if (n != 0.0 && !move_gamma2(gamma2_data, scalar_value(sse) / n, decay, floor, monotone)) *skipped_data += 1;
  } else {
    on_cuda(gamma2, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_update_gamma2(gamma2_data, skipped_data, sse.const_data_ptr(),
                                sse.scalar_type() == ScalarType::Double, count.const_data_ptr(), count_is_double,
                                decay, floor, monotone, launch);
#endif
    });
  }
}

}  // namespace bvae
