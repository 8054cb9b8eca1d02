// Batch normalisation and ReLU of NHWC images in one pass each way, on the CPU. On CUDA cuDNN does it.
#include "ops.h"

namespace bvae {
namespace {

// Rows whose sums are added up by themselves: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kPiece = 1024;

struct Images {
  DType type;
  int64_t rows;  // pixels of the batch
  int64_t channels;
};

Images images_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), "bvae: batch_norm_relu runs on the CPU only");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "bvae: ", name, " must be [B, C, H, W], not empty");
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t strides[4] = {c * h * w, 1, c * w, c};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == strides[i], "bvae: ", name, " must be in channels_last memory");
  }
  return {dtype_of(x, name), x.size(0) * h * w, c};
}

const float* per_channel(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.numel() == channels && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.is_cpu(),
                  "bvae: ", name, " must be float32 [C]");
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor empty_images(const Tensor& like) {
  const int64_t c = like.size(1), h = like.size(2), w = like.size(3);
  const int64_t strides[4] = {c * h * w, 1, c * w, c};
  const std::vector<int64_t> sizes = sizes_of(like);
  return empty_strided(like, sizes.data(), strides, 4, like.scalar_type());
}

// Runs sum(begin, end, double[2 * channels]) over pieces of the rows; adds up what they give, in order.
template <class F>
std::vector<double> sums_over_rows(const Images& x, const F& sum) {
  const int64_t pieces = (x.rows + kPiece - 1) / kPiece, width = 2 * x.channels;
  std::vector<double> parts(static_cast<size_t>(pieces * width), 0.0), total(static_cast<size_t>(width), 0.0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      sum(p * kPiece, std::min((p + 1) * kPiece, x.rows), parts.data() + p * width);
    }
  });
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t i = 0; i < width; ++i) total[static_cast<size_t>(i)] += parts[static_cast<size_t>(p * width + i)];
  }
  return total;
}

template <class F>
void over_rows(const Images& x, const F& f) {
  torch::stable::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.channels), f);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   Tensor running_mean, Tensor running_var, double momentum,
                                                   double eps) {
  const Images images = images_of(x, "x");
  const int64_t c = images.channels;
  const float* w = per_channel(weight, c, "weight");
  const float* b = per_channel(bias, c, "bias");
  per_channel(running_mean, c, "running_mean");
  per_channel(running_var, c, "running_var");
  STD_TORCH_CHECK(images.rows > 1, "bvae: batch norm needs more than one value a channel");
  Tensor y = empty_images(x), mean = empty(x, {c}, ScalarType::Float), invstd = empty(x, {c}, ScalarType::Float);
  const void* from = x.const_data_ptr();
  const CpuLoops& loops = cpu_loops();

  // About the first pixel rather than about zero: a mean far from zero would cancel in the variance.
  std::vector<float> origin(static_cast<size_t>(c)), scale(static_cast<size_t>(c));
  loops.widen(images.type, from, origin.data(), c);
  const std::vector<double> sums = sums_over_rows(images, [&](int64_t begin, int64_t end, double* out) {
    loops.moments(images.type, from, origin.data(), out, c, begin, end);
  });
  float* m = static_cast<float*>(mean.mutable_data_ptr());
  float* s = static_cast<float*>(invstd.mutable_data_ptr());
  float* rm = static_cast<float*>(running_mean.mutable_data_ptr());
  float* rv = static_cast<float*>(running_var.mutable_data_ptr());
  const double n = static_cast<double>(images.rows);
  for (int64_t i = 0; i < c; ++i) {
    const size_t j = static_cast<size_t>(i);
    const double offset = sums[j] / n;
    // std::max(0, NaN) would be 0: what is not finite must stay so.
    const double spread = sums[j + static_cast<size_t>(c)] / n - offset * offset;
    const double var = spread < 0.0 ? 0.0 : spread;
    const double average = origin[j] + offset;
    m[i] = static_cast<float>(average);
    s[i] = static_cast<float>(1.0 / std::sqrt(var + eps));
    rm[i] = static_cast<float>((1.0 - momentum) * rm[i] + momentum * average);
    rv[i] = static_cast<float>((1.0 - momentum) * rv[i] + momentum * var * (n / (n - 1.0)));
    scale[j] = w[i] * s[i];
  }
  void* to = y.mutable_data_ptr();
  over_rows(images, [&](int64_t begin, int64_t end) {
    loops.scale_relu(images.type, from, m, scale.data(), b, to, c, begin, end);
  });
  return {y, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& invstd) {
  const Images images = images_of(x, "x");
  images_of(grad, "grad");
  STD_TORCH_CHECK(same_sizes(grad, x) && grad.scalar_type() == x.scalar_type(), "bvae: grad must be like x");
  const int64_t c = images.channels;
  const float* w = per_channel(weight, c, "weight");
  const float* b = per_channel(bias, c, "bias");
  const float* m = per_channel(mean, c, "mean");
  const float* s = per_channel(invstd, c, "invstd");
  Tensor grad_x = empty_images(x), grad_weight = empty(x, {c}, ScalarType::Float);
  Tensor grad_bias = empty(x, {c}, ScalarType::Float);
  const void* from = x.const_data_ptr();
  const void* g = grad.const_data_ptr();
  const CpuLoops& loops = cpu_loops();

  const size_t channels = static_cast<size_t>(c);
  std::vector<float> scale(channels), slope(channels), constant(channels);
  for (size_t i = 0; i < channels; ++i) scale[i] = w[i] * s[i];
  // Sums of the gradient where the ReLU let x through, and of its product with x - mean.
  const std::vector<double> sums = sums_over_rows(images, [&](int64_t begin, int64_t end, double* out) {
    loops.gradient_moments(images.type, g, from, m, scale.data(), b, out, c, begin, end);
  });
  float* gw = static_cast<float*>(grad_weight.mutable_data_ptr());
  float* gb = static_cast<float*>(grad_bias.mutable_data_ptr());
  const double n = static_cast<double>(images.rows);
  for (size_t i = 0; i < channels; ++i) {
    gb[i] = static_cast<float>(sums[i]);
    gw[i] = static_cast<float>(sums[i + channels] * s[i]);
    // grad_x = scale (grad - mean(grad) - xhat mean(grad xhat)), with xhat = invstd (x - mean)
    slope[i] = static_cast<float>(scale[i] * s[i] * s[i] * sums[i + channels] / n);
    constant[i] = static_cast<float>(scale[i] * sums[i] / n);
  }
  void* to = grad_x.mutable_data_ptr();
  over_rows(images, [&](int64_t begin, int64_t end) {
    loops.scale_relu_grad(images.type, g, from, m, scale.data(), b, slope.data(), constant.data(), to, c, begin, end);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace bvae
