// Adam over all parameters, and the check of their gradients: checks, memory layouts, the CPU's threads.
#include "adam.h"

#include <atomic>

#include "ops.h"

namespace bvae {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

// Runs f(tensor, begin, end) over the elements of all tensors, in parts of equal size whatever the tensors' sizes.
template <class T, class F>
void over_elements(const std::vector<T>& tensors, const F& f) {
  std::vector<int64_t> first{0};  // start of each tensor's elements, were all in a row; then their number
  for (const T& t : tensors) first.push_back(first.back() + t.numel);
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; i < tensors.size() && first[i] < end; ++i) {
      f(tensors[i], std::max(begin, first[i]) - first[i], std::min(end, first[i + 1]) - first[i]);
    }
  });
}

DType half_or_single(const Tensor& t, const char* name) {
  const DType type = dtype_of(t, name);
  STD_TORCH_CHECK(type != DType::f64, "bvae: ", name, " must not be float64");
  return type;
}

// `t` in the memory layout of `like`: itself, or a copy, which `kept` then holds.
const void* laid_out(const Tensor& t, const Tensor& like, std::vector<Tensor>* kept) {
  if (same_strides(t, like)) return t.const_data_ptr();
  const auto sizes = like.sizes(), strides = like.strides();
  Tensor copy = empty_strided(like, sizes.data(), strides.data(), like.dim(), t.scalar_type());
  torch::stable::copy_(copy, t);
  kept->push_back(copy);
  return copy.const_data_ptr();
}

}  // namespace

Tensor all_finite(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> kept;
  std::vector<Elements> all;
  for (const Tensor& t : tensors) {
    check_same_device(tensors[0], t, "the first tensor", "another");
    const DType type = half_or_single(t, "a tensor");
    if (t.numel() == 0) continue;
    if (!is_dense(t)) kept.push_back(torch::stable::clone(t));
    all.push_back({type, (is_dense(t) ? t : kept.back()).const_data_ptr(), t.numel()});
  }
  Tensor finite = empty_scalar(tensors[0], ScalarType::Bool);
  bool* result = static_cast<bool*>(finite.mutable_data_ptr());
  if (runs_on_cpu(finite)) {
    std::atomic<bool> good{true};
    over_elements(all, [&](const Elements& t, int64_t begin, int64_t end) {
      if (cpu_loops().largest_magnitude(t.type, t.data, begin, end) >= kTooLarge) good = false;
    });
    *result = good;
  } else {
    on_cuda(finite, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_all_finite(all.data(), static_cast<int64_t>(all.size()), result, launch);
#endif
    });
  }
  return finite;
}

void adam(const std::vector<Tensor>& parameters, const std::vector<std::optional<Tensor>>& grads,
          const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
          const std::vector<Tensor>& halves, const std::vector<int64_t>& halved, Tensor steps, const Tensor& good,
          const Tensor& lr, double beta1, double beta2, double eps) {
  const size_t n = parameters.size();
  STD_TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n, "bvae: adam takes lists of one "
                  "length");
  STD_TORCH_CHECK(halves.size() == halved.size(), "bvae: every copy needs its parameter's number");
  STD_TORCH_CHECK(steps.dim() == 1 && steps.size(0) == static_cast<int64_t>(n) &&
                      steps.scalar_type() == ScalarType::Float && steps.is_contiguous(),
                  "bvae: steps must be float32, one for each parameter");
  check_scalar(good, ScalarType::Bool, "good");
  check_scalar(lr, ScalarType::Float, "lr");
  check_same_device(steps, good, "steps", "good");
  check_same_device(steps, lr, "steps", "lr");
  std::vector<uint16_t*> copies(n, nullptr);
  for (size_t j = 0; j < halves.size(); ++j) {
    const int64_t i = halved[j];
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(n), "bvae: there is no parameter ", i);
    const Tensor &half = halves[j], &p = parameters[static_cast<size_t>(i)];
    check_same_device(steps, half, "steps", "a copy");
    STD_TORCH_CHECK(half.scalar_type() == ScalarType::BFloat16 && same_sizes(half, p) && same_strides(half, p),
                    "bvae: a copy must be bfloat16, laid out as its parameter");
    copies[static_cast<size_t>(i)] = static_cast<uint16_t*>(half.mutable_data_ptr());
  }
  std::vector<Tensor> kept;
  std::vector<AdamTensor> all;
  for (size_t i = 0; i < n; ++i) {
    if (!grads[i].has_value()) continue;
    const Tensor &p = parameters[i], &g = *grads[i];
    for (const Tensor* t : {&p, &exp_avgs[i], &exp_avg_sqs[i]}) {
      check_same_device(steps, *t, "steps", "a parameter or its moments");
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && is_dense(*t) && same_sizes(*t, p) && same_strides(*t, p),
                      "bvae: adam takes a parameter and its moments in float32, dense and alike");
    }
    check_same_device(steps, g, "steps", "a gradient");
    STD_TORCH_CHECK(same_sizes(g, p), "bvae: a gradient must have its parameter's shape");
    AdamTensor t{};
    t.type = half_or_single(g, "a gradient");
    t.grad = laid_out(g, p, &kept);
    t.parameter = static_cast<float*>(p.mutable_data_ptr());
    t.exp_avg = static_cast<float*>(exp_avgs[i].mutable_data_ptr());
    t.exp_avg_sq = static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr());
    t.half = copies[i];
    t.numel = p.numel();
    t.slot = static_cast<int>(i);
    all.push_back(t);
  }
  if (all.empty()) return;

  float* counts = static_cast<float*>(steps.mutable_data_ptr());
  const bool* gate = static_cast<const bool*>(good.const_data_ptr());
  const float* rate = static_cast<const float*>(lr.const_data_ptr());
  const AdamFactors factors = adam_factors(beta1, beta2, eps);
  if (runs_on_cpu(steps)) {
    if (!*gate) return;
    for (AdamTensor& t : all) t.corrections = adam_corrections(*rate, beta1, beta2, counts[t.slot] += 1.0f);
    over_elements(all, [&](const AdamTensor& t, int64_t begin, int64_t end) {
      cpu_loops().adam(factors, t.corrections, t.type, t.grad, t.parameter, t.exp_avg, t.exp_avg_sq, t.half, begin,
                       end);
    });
  } else {
    on_cuda(steps, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(steps, {static_cast<int64_t>(all.size() * sizeof(AdamCorrections))}, ScalarType::Byte);
      return cuda_adam({all.data(), static_cast<int64_t>(all.size()), counts, gate, rate, beta1, beta2, factors,
                        static_cast<AdamCorrections*>(scratch.mutable_data_ptr())},
                       launch);
#endif
    });
  }
}

}  // namespace bvae
