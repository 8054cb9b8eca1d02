// Sampling, KL and per-latent moments: checks, allocation, the CPU's threads.
#include "ops.h"

namespace bvae {
namespace {

struct Shape {
  int64_t batch, k;
};

Shape check_inputs(const Tensor& mu, const Tensor& log_sigma, const Tensor& rng) {
  STD_TORCH_CHECK(mu.dim() >= 1 && same_sizes(mu, log_sigma), "bvae: mu and log_sigma must have one shape [B, ...]");
  STD_TORCH_CHECK(mu.scalar_type() == log_sigma.scalar_type(), "bvae: mu and log_sigma must have one dtype, got ",
                  torch::headeronly::toString(mu.scalar_type()), " and ",
                  torch::headeronly::toString(log_sigma.scalar_type()));
  check_same_device(mu, log_sigma, "mu", "log_sigma");
  check_same_device(mu, rng, "mu", "rng");
  int64_t k = 1;
  for (int64_t i = 1; i < mu.dim(); ++i) k *= mu.size(i);
  return {mu.size(0), k};
}

void check_rng(const Tensor& rng) {
  STD_TORCH_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 2 && rng.is_contiguous(),
                  "bvae: rng must be a contiguous int64 tensor {seed, offset} (bvae.ops.make_rng)");
}

// A view of t as [B, k] with dense rows, into t itself where its rows are dense, else into a contiguous copy kept in
// `keep`. Half of a [B, 2k] head needs no copy.
Rows as_rows(const Tensor& t, Tensor& keep, int64_t k) {
  const auto sizes = t.sizes(), strides = t.strides();
  bool dense = true;
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 1;) {
    if (sizes[i] != 1 && strides[i] != step) dense = false;
    step *= sizes[i];
  }
  if (dense) return {t.const_data_ptr(), sizes[0] > 1 ? strides[0] : k};
  keep = as_contiguous(t);
  return {keep.const_data_ptr(), k};
}

RngState state_of(const Tensor& rng) {
  const int64_t* p = static_cast<const int64_t*>(rng.const_data_ptr());
  return {p[0], p[1]};
}

// Rows are cut into chunks that depend on the shape alone, so that sums do not depend on the number of threads.
int64_t rows_per_chunk(Shape s) {
  const int64_t enough_work = (2048 + s.k) / std::max<int64_t>(s.k, 1);
  const int64_t few_chunks = (s.batch + 63) / 64;
  return std::max<int64_t>({1, enough_work, few_chunks});
}

template <class F>
void for_row_ranges(Shape s, const F& f) {
  const int64_t per_chunk = rows_per_chunk(s);
  const int64_t chunks = (s.batch + per_chunk - 1) / per_chunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c, c * per_chunk, std::min((c + 1) * per_chunk, s.batch));
  });
}

template <class A>
void finish_sums(const std::vector<double>& partial, int64_t chunks, int64_t k, A* kl, A* moments) {
  double total = 0.0;
  for (int64_t i = 0; i < 4 * k; ++i) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * 4 * k + i];
    moments[i] = static_cast<A>(sum);
    if (i >= 3 * k) total += sum;
  }
  *kl = static_cast<A>(total);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_kl(const Tensor& mu, const Tensor& log_sigma, Tensor rng,
                                                     int64_t first_sample, bool advance) {
  check_rng(rng);
  const DType type = dtype_of(mu, "mu");
  const Shape s = check_inputs(mu, log_sigma, rng);
  Tensor z = empty(mu, sizes_of(mu), mu.scalar_type());
  Tensor kl = empty_scalar(mu, sum_type(type));
  Tensor moments = empty(mu, {4, s.k}, sum_type(type));
  Tensor state = empty(mu, {2}, ScalarType::Long);
  Tensor keep_mu, keep_log_sigma;
  const Rows m = as_rows(mu, keep_mu, s.k), l = as_rows(log_sigma, keep_log_sigma, s.k);
  int64_t* state_data = static_cast<int64_t*>(state.mutable_data_ptr());
  int64_t* rng_data = static_cast<int64_t*>(rng.mutable_data_ptr());

  if (runs_on_cpu(mu)) {
    const RngState noise = state_of(rng);
    const int64_t per_chunk = rows_per_chunk(s);
    const int64_t chunks = (s.batch + per_chunk - 1) / per_chunk;
    std::vector<double> partial(chunks * 4 * s.k, 0.0);
    void* z_data = z.mutable_data_ptr();
    for_row_ranges(s, [&](int64_t chunk, int64_t begin, int64_t end) {
      cpu_loops().sample(type, m, l, z_data, partial.data() + chunk * 4 * s.k, s.k, noise, first_sample, begin, end);
    });
    if (type == DType::f64) {
      finish_sums(partial, chunks, s.k, static_cast<double*>(kl.mutable_data_ptr()),
                  static_cast<double*>(moments.mutable_data_ptr()));
    } else {
      finish_sums(partial, chunks, s.k, static_cast<float*>(kl.mutable_data_ptr()),
                  static_cast<float*>(moments.mutable_data_ptr()));
    }
    state_data[0] = noise.seed;
    state_data[1] = noise.offset;
    if (advance) rng_data[1] += 1;
  } else {
    on_cuda(mu, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      Tensor scratch = empty(mu, {sample_kl_scratch_bytes(s.batch, s.k, launch)}, ScalarType::Byte);
      return cuda_sample_kl({type, m, l, z.mutable_data_ptr(), kl.mutable_data_ptr(), moments.mutable_data_ptr(),
                             rng_data, state_data, scratch.mutable_data_ptr(), s.batch, s.k, first_sample, advance},
                            launch);
#endif
    });
  }
  return {z, kl, moments, state};
}

std::tuple<Tensor, Tensor> sample_kl_backward(const std::optional<Tensor>& grad_z,
                                              const std::optional<Tensor>& grad_kl, const Tensor& mu,
                                              const Tensor& log_sigma, const Tensor& state, int64_t first_sample) {
  check_rng(state);
  const DType type = dtype_of(mu, "mu");
  const Shape s = check_inputs(mu, log_sigma, state);
  std::optional<Tensor> g_z, g_kl;
  bool per_latent = false;
  if (grad_z.has_value()) {
    STD_TORCH_CHECK(same_sizes(*grad_z, mu) && grad_z->scalar_type() == mu.scalar_type(),
                    "bvae: the gradient of z must have z's shape and dtype");
    check_same_device(mu, *grad_z, "mu", "the gradient of z");
    g_z = as_contiguous(*grad_z);
  }
  if (grad_kl.has_value()) {
    per_latent = grad_kl->dim() == 1;
    STD_TORCH_CHECK(grad_kl->scalar_type() == sum_type(type) && grad_kl->numel() == (per_latent ? s.k : 1),
                    "bvae: the gradient of kl must be one number or [k], of the type of the sums");
    check_same_device(mu, *grad_kl, "mu", "the gradient of kl");
    g_kl = as_contiguous(*grad_kl);
  }
  Tensor grad_mu = empty(mu, sizes_of(mu), mu.scalar_type());
  Tensor grad_log_sigma = empty(mu, sizes_of(mu), mu.scalar_type());
  Tensor keep_mu, keep_log_sigma;
  const Rows m = as_rows(mu, keep_mu, s.k), l = as_rows(log_sigma, keep_log_sigma, s.k);
  void* g_m = grad_mu.mutable_data_ptr();
  void* g_l = grad_log_sigma.mutable_data_ptr();
  if (runs_on_cpu(mu)) {
    const RngState noise = state_of(state);
    const void* g = optional_data(g_z);
    for_row_ranges(s, [&](int64_t, int64_t begin, int64_t end) {
      cpu_loops().sample_grad(type, g, optional_data(g_kl), per_latent, m, l, g_m, g_l, s.k, noise, first_sample, begin,
                              end);
    });
  } else {
    on_cuda(mu, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_sample_kl_backward({type, optional_data(g_z), optional_data(g_kl), m, l,
                                      static_cast<const int64_t*>(state.const_data_ptr()), g_m, g_l, s.batch, s.k,
                                      first_sample, per_latent},
                                     launch);
#endif
    });
  }
  return {grad_mu, grad_log_sigma};
}

static Tensor noise(const Tensor& rng, int64_t rows, int64_t k, int64_t first_sample, bool raw) {
  check_rng(rng);
  STD_TORCH_CHECK(rows >= 0 && k >= 0, "bvae: rows and k must not be negative, got ", rows, " and ", k);
  Tensor out = empty(rng, {rows, k}, raw ? ScalarType::Long : ScalarType::Float);
  int64_t* words = raw ? static_cast<int64_t*>(out.mutable_data_ptr()) : nullptr;
  float* normals = raw ? nullptr : static_cast<float*>(out.mutable_data_ptr());
  if (runs_on_cpu(rng)) {
    const RngState state = state_of(rng);
    for_row_ranges({rows, k}, [&](int64_t, int64_t begin, int64_t end) {
      cpu_loops().noise(words, normals, k, state, first_sample, begin, end);
    });
  } else {
    on_cuda(rng, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_noise(words, normals, static_cast<const int64_t*>(rng.const_data_ptr()), rows, k, first_sample,
                        launch);
#endif
    });
  }
  return out;
}

Tensor philox_words(const Tensor& rng, int64_t rows, int64_t k, int64_t first_sample) {
  return noise(rng, rows, k, first_sample, true);
}

Tensor philox_normal(const Tensor& rng, int64_t rows, int64_t k, int64_t first_sample) {
  return noise(rng, rows, k, first_sample, false);
}

}  // namespace bvae
