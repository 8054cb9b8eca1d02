// Batch normalisation and ReLU of NHWC images in two passes each way, the end of a residual block, the ReLU of a dense
// layer backward: checks, allocation, the CPU's threads.
#include "half.h"
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
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "bvae: ", name, " must be [B, C, H, W], not empty");
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t strides[4] = {c * h * w, 1, c * w, c};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == strides[i], "bvae: ", name, " must be in channels_last memory");
  }
  const DType type = dtype_of(x, name);
  STD_TORCH_CHECK(type != DType::f64, "bvae: ", name, " must not be float64");
  return {type, x.size(0) * h * w, c};
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  images_of(t, name);
  check_same_device(x, t, "x", name);
  STD_TORCH_CHECK(same_sizes(t, x) && t.scalar_type() == x.scalar_type(), "bvae: ", name, " must be like x");
}

void check_numbers(const Tensor& t, const Tensor& x, int64_t count, ScalarType type, const char* name,
                   const char* wanted) {
  check_same_device(x, t, "x", name);
  STD_TORCH_CHECK(t.numel() == count && t.scalar_type() == type && t.is_contiguous(), "bvae: ", name, " must be ",
                  wanted);
}

const float* per_channel(const Tensor& t, const Tensor& x, const char* name) {
  check_numbers(t, x, x.size(1), ScalarType::Float, name, "float32 [C]");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* per_channel(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  return t.has_value() ? per_channel(*t, x, name) : nullptr;
}

unsigned int* counters_of(Tensor t, const Tensor& x) {
  check_numbers(t, x, x.size(1), ScalarType::Int, "counters", "int32 [C]");
  return static_cast<unsigned int*>(t.mutable_data_ptr());
}

float* writable(Tensor t, const Tensor& x, const char* name) {
  per_channel(t, x, name);
  return static_cast<float*>(t.mutable_data_ptr());
}

Tensor empty_images(const Tensor& like) {
  const int64_t c = like.size(1), h = like.size(2), w = like.size(3);
  const int64_t strides[4] = {c * h * w, 1, c * w, c};
  const std::vector<int64_t> sizes = sizes_of(like);
  return empty_strided(like, sizes.data(), strides, 4, like.scalar_type());
}

Tensor nothing(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

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

// The sum of each channel over the rows.
std::vector<double> channel_sums(const Images& x, const void* data) {
  const std::vector<float> zeros(static_cast<size_t>(x.channels), 0.0f);
  std::vector<double> sums = sums_over_rows(x, [&](int64_t begin, int64_t end, double* out) {
    cpu_loops().moments(x.type, data, zeros.data(), out, x.channels, begin, end);
  });
  sums.resize(static_cast<size_t>(x.channels));  // the rest are sums of squares
  return sums;
}

template <class F>
void over_rows(const Images& x, const F& f) {
  torch::stable::parallel_for(0, x.rows, std::max<int64_t>(1, 32768 / x.channels), f);
}

void add_biased(const Images& images, const void* a, const void* b, const float* bias, void* out) {
  over_rows(images, [&](int64_t begin, int64_t end) {
    cpu_loops().add_biased(images.type, a, b, bias, out, images.channels, begin, end);
  });
}

void forward_on_cpu(const NormArgs& args) {
  const Images images{args.type, args.rows, args.channels};
  const int64_t c = args.channels;
  const CpuLoops& loops = cpu_loops();
  // About the first pixel rather than about zero: a mean far from zero would cancel in the variance.
  std::vector<float> origin(static_cast<size_t>(c)), scale(static_cast<size_t>(c));
  loops.widen(args.type, args.x, origin.data(), c);
  const std::vector<double> sums = sums_over_rows(images, [&](int64_t begin, int64_t end, double* out) {
    loops.moments(args.type, args.x, origin.data(), out, c, begin, end);
  });
  float *mean = args.statistics, *invstd = args.statistics + c;
  const double n = static_cast<double>(args.rows);
  for (int64_t i = 0; i < c; ++i) {
    const size_t j = static_cast<size_t>(i);
    const ChannelMoments batch = channel_moments(origin[j], sums[j], sums[j + static_cast<size_t>(c)], n);
    mean[i] = static_cast<float>(batch.mean);
    invstd[i] = inverse_deviation(batch.var, args.eps);
    const double offset = args.offset != nullptr ? args.offset[i] : 0.0;
    args.running_mean[i] = mixed(args.running_mean[i], batch.mean + offset, args.momentum);
    args.running_var[i] = mixed(args.running_var[i], unbiased(batch.var, n), args.momentum);
    scale[j] = args.weight[i] * invstd[i];
  }
  *args.running_weight = mixed(*args.running_weight, 1.0, args.momentum);
  over_rows(images, [&](int64_t begin, int64_t end) {
    loops.scale_relu(args.type, args.x, mean, scale.data(), args.bias, args.y, c, begin, end);
  });
  if (args.through != nullptr) add_biased(images, args.x, nullptr, args.offset, args.through);
}

void backward_on_cpu(const NormGradArgs& args) {
  const Images images{args.type, args.rows, args.channels};
  const int64_t c = args.channels;
  const size_t channels = static_cast<size_t>(c);
  const CpuLoops& loops = cpu_loops();
  const float *mean = args.statistics, *invstd = args.statistics + c;
  std::vector<float> scale(channels), slope(channels), constant(channels);
  for (size_t i = 0; i < channels; ++i) scale[i] = args.weight[i] * invstd[i];
  const std::vector<double> sums = sums_over_rows(images, [&](int64_t begin, int64_t end, double* out) {
    loops.gradient_moments(args.type, args.grad, args.x, mean, scale.data(), args.bias, out, c, begin, end);
  });
  for (size_t i = 0; i < channels; ++i) {
    const NormGradient g =
        norm_gradient(sums[i], sums[i + channels], scale[i], invstd[i], static_cast<double>(args.rows));
    args.grad_bias[i] = g.bias;
    args.grad_weight[i] = g.weight;
    slope[i] = g.slope;
    constant[i] = g.constant;
  }
  if (args.grad_offset != nullptr) {
    const std::vector<double> passed = channel_sums(images, args.grad_through);
    for (size_t i = 0; i < channels; ++i) args.grad_offset[i] = static_cast<float>(passed[i]);
  }
  over_rows(images, [&](int64_t begin, int64_t end) {
    loops.scale_relu_grad(args.type, args.grad, args.x, mean, scale.data(), args.bias, slope.data(), constant.data(),
                          args.grad_through, args.grad_x, c, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const std::optional<Tensor>& offset,
                                                   const Tensor& weight, const Tensor& bias, Tensor running_mean,
                                                   Tensor running_var, Tensor running_weight, Tensor counters,
                                                   double momentum, double eps, bool through) {
  const Images images = images_of(x, "x");
  STD_TORCH_CHECK(images.rows > 1, "bvae: batch norm needs more than one value a channel");
  check_numbers(running_weight, x, 1, ScalarType::Float, "running_weight", "one float32 element");
  // Without an offset, what goes through is x itself.
  const bool writes_through = through && offset.has_value();
  Tensor y = empty_images(x), passed = writes_through ? empty_images(x) : nothing(x);
  Tensor statistics = empty(x, {2, images.channels}, ScalarType::Float);
  NormArgs args{};
  args.type = images.type;
  args.x = x.const_data_ptr();
  args.offset = per_channel(offset, x, "offset");
  args.weight = per_channel(weight, x, "weight");
  args.bias = per_channel(bias, x, "bias");
  args.running_mean = writable(running_mean, x, "running_mean");
  args.running_var = writable(running_var, x, "running_var");
  args.running_weight = static_cast<float*>(running_weight.mutable_data_ptr());
  args.counters = counters_of(counters, x);
  args.y = y.mutable_data_ptr();
  args.through = writes_through ? passed.mutable_data_ptr() : nullptr;
  args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  args.rows = images.rows;
  args.channels = images.channels;
  args.momentum = momentum;
  args.eps = eps;
  if (runs_on_cpu(x)) {
    forward_on_cpu(args);
  } else {
    on_cuda(x, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(x, {batch_norm_scratch_bytes(images.rows, images.channels, launch)}, ScalarType::Byte);
      args.scratch = scratch.mutable_data_ptr();
      return cuda_batch_norm_relu(args, launch);
#endif
    });
  }
  return {y, passed, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_through, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& statistics, Tensor counters, bool offset_gradient) {
  const Images images = images_of(x, "x");
  const int64_t c = images.channels;
  check_like(grad, x, "grad");
  if (grad_through.has_value()) check_like(*grad_through, x, "grad_through");
  check_numbers(statistics, x, 2 * c, ScalarType::Float, "statistics", "float32 [2, C]");
  STD_TORCH_CHECK(!offset_gradient || grad_through.has_value(), "bvae: the offset has no gradient but what came through");
  Tensor grad_x = empty_images(x), grad_weight = empty(x, {c}, ScalarType::Float);
  Tensor grad_bias = empty(x, {c}, ScalarType::Float);
  Tensor grad_offset = offset_gradient ? empty(x, {c}, ScalarType::Float) : nothing(x);
  NormGradArgs args{};
  args.type = images.type;
  args.grad = grad.const_data_ptr();
  args.grad_through = optional_data(grad_through);
  args.x = x.const_data_ptr();
  args.weight = per_channel(weight, x, "weight");
  args.bias = per_channel(bias, x, "bias");
  args.statistics = static_cast<const float*>(statistics.const_data_ptr());
  args.counters = counters_of(counters, x);
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  args.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  args.grad_offset = offset_gradient ? static_cast<float*>(grad_offset.mutable_data_ptr()) : nullptr;
  args.rows = images.rows;
  args.channels = c;
  if (runs_on_cpu(x)) {
    backward_on_cpu(args);
  } else {
    on_cuda(x, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(x, {batch_norm_scratch_bytes(images.rows, c, launch)}, ScalarType::Byte);
      args.scratch = scratch.mutable_data_ptr();
      return cuda_batch_norm_relu_backward(args, launch);
#endif
    });
  }
  return {grad_x, grad_weight, grad_bias, grad_offset};
}

Tensor add_biased(const Tensor& a, const Tensor& b, const Tensor& bias_a, const Tensor& bias_b) {
  const Images images = images_of(a, "a");
  check_like(b, a, "b");
  const float* first = per_channel(bias_a, a, "bias_a");
  const float* second = per_channel(bias_b, a, "bias_b");
  Tensor out = empty_images(a);
  void* to = out.mutable_data_ptr();
  if (runs_on_cpu(a)) {
    std::vector<float> bias(static_cast<size_t>(images.channels));
    for (size_t i = 0; i < bias.size(); ++i) bias[i] = first[i] + second[i];
    add_biased(images, a.const_data_ptr(), b.const_data_ptr(), bias.data(), to);
  } else {
    on_cuda(a, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_add_biased({images.type, a.const_data_ptr(), b.const_data_ptr(), first, second, to, images.rows,
                              images.channels},
                             launch);
#endif
    });
  }
  return out;
}

std::tuple<Tensor, Tensor> channel_sums(const Tensor& x, Tensor counters) {
  const Images images = images_of(x, "x");
  [[maybe_unused]] unsigned int* tickets = counters_of(counters, x);
  Tensor sums = empty(x, {images.channels}, ScalarType::Float), again = empty(x, {images.channels}, ScalarType::Float);
  float* out = static_cast<float*>(sums.mutable_data_ptr());
  float* copy = static_cast<float*>(again.mutable_data_ptr());
  if (runs_on_cpu(x)) {
    const std::vector<double> exact = channel_sums(images, x.const_data_ptr());
    for (size_t i = 0; i < exact.size(); ++i) out[i] = copy[i] = static_cast<float>(exact[i]);
  } else {
    on_cuda(x, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(x, {batch_norm_scratch_bytes(images.rows, images.channels, launch)}, ScalarType::Byte);
      return cuda_channel_sums({images.type, x.const_data_ptr(), tickets, out, copy, scratch.mutable_data_ptr(),
                                images.rows, images.channels},
                               launch);
#endif
    });
  }
  return {sums, again};
}

std::tuple<Tensor, Tensor> relu_grad(const Tensor& grad, const Tensor& y, Tensor counters) {
  STD_TORCH_CHECK(y.dim() == 2 && y.numel() > 0 && y.is_contiguous() && grad.is_contiguous() && same_sizes(grad, y) &&
                      grad.scalar_type() == y.scalar_type(),
                  "bvae: grad and y must be alike, [B, C] and contiguous, not empty");
  check_same_device(y, grad, "y", "grad");
  const Images matrix{dtype_of(y, "y"), y.size(0), y.size(1)};
  STD_TORCH_CHECK(matrix.type != DType::f64, "bvae: y must not be float64");
  [[maybe_unused]] unsigned int* tickets = counters_of(counters, y);
  Tensor out = empty(y, sizes_of(y), y.scalar_type()), sums = empty(y, {matrix.channels}, y.scalar_type());
  const void* g = grad.const_data_ptr();
  const void* values = y.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (runs_on_cpu(y)) {
    torch::stable::parallel_for(0, y.numel(), 32768, [&](int64_t begin, int64_t end) {
      cpu_loops().relu_grad(matrix.type, g, values, to, begin, end);
    });
    const std::vector<double> exact = channel_sums(matrix, to);
    void* of_columns = sums.mutable_data_ptr();
    for (size_t i = 0; i < exact.size(); ++i) {
      const float sum = static_cast<float>(exact[i]);
      if (matrix.type == DType::f32) {
        static_cast<float*>(of_columns)[i] = sum;
      } else {
        static_cast<uint16_t*>(of_columns)[i] = matrix.type == DType::bf16 ? bf16_from_float(sum) : f16_from_float(sum);
      }
    }
  } else {
    on_cuda(y, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(y, {batch_norm_scratch_bytes(matrix.rows, matrix.channels, launch)}, ScalarType::Byte);
      return cuda_relu_grad({matrix.type, g, values, tickets, to, sums.mutable_data_ptr(), scratch.mutable_data_ptr(),
                             matrix.rows, matrix.channels},
                            launch);
#endif
    });
  }
  return {out, sums};
}

}  // namespace bvae
