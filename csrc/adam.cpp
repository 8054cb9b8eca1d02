// Adam on the CPU, from a gradient in bf16 or float32, writing a bf16 copy of the parameters beside them.
#include "ops.h"

namespace bvae {

// Elements whose squares are added up by themselves: fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kPiece = 32768;

Tensor square_sum(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && is_dense(t), "bvae: square_sum takes a dense tensor on the CPU");
  const DType type = dtype_of(t, "t");
  const int64_t n = t.numel(), pieces = (n + kPiece - 1) / kPiece;
  const void* data = t.const_data_ptr();
  std::vector<double> parts(static_cast<size_t>(pieces));
  torch::stable::parallel_for(0, pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      parts[static_cast<size_t>(p)] = cpu_loops().square_sum(type, data, p * kPiece, std::min((p + 1) * kPiece, n));
    }
  });
  Tensor sum = empty_scalar(t, ScalarType::Double);
  double total = 0.0;
  for (const double part : parts) total += part;
  *static_cast<double*>(sum.mutable_data_ptr()) = total;
  return sum;
}

void adam(Tensor parameter, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> half,
          double step, double lr, double beta1, double beta2, double eps) {
  for (const Tensor* t : {&parameter, &exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && is_dense(*t) &&
                        same_sizes(*t, parameter) && same_strides(*t, parameter),
                    "bvae: adam takes a parameter and moments in float32 on the CPU, dense and alike");
  }
  STD_TORCH_CHECK(grad.is_cpu() && same_sizes(grad, parameter) && same_strides(grad, parameter),
                  "bvae: the gradient must be laid out as the parameter");
  uint16_t* copy = nullptr;
  if (half.has_value()) {
    STD_TORCH_CHECK(half->is_cpu() && half->scalar_type() == ScalarType::BFloat16 && same_sizes(*half, parameter) &&
                        same_strides(*half, parameter),
                    "bvae: the copy must be bfloat16, laid out as the parameter");
    copy = static_cast<uint16_t*>(half->mutable_data_ptr());
  }
  const DType type = dtype_of(grad, "grad");
  STD_TORCH_CHECK(type != DType::f64, "bvae: the gradient must not be float64");
  const void* g = grad.const_data_ptr();
  float* p = static_cast<float*>(parameter.mutable_data_ptr());
  float* m = static_cast<float*>(exp_avg.mutable_data_ptr());
  float* v = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  const float step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  const float inverse = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  torch::stable::parallel_for(0, parameter.numel(), kPiece, [&](int64_t begin, int64_t end) {
    cpu_loops().adam(type, g, p, m, v, copy, beta1, beta2, step_size, inverse, static_cast<float>(eps), begin, end);
  });
}

}  // namespace bvae
