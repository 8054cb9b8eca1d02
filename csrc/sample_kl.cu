// Sampling, KL and moments on CUDA. A thread takes four neighbouring latents, which share one Philox call; a block takes
// 64 latents and a chunk of the rows.
#include "device.cuh"
#include "philox.h"

namespace bvae {
namespace {

constexpr int kQuadsX = 16;                      // quads of latents across a block
constexpr int kRowsY = kThreads / kQuadsX;       // rows at a time
constexpr int64_t kMaxPartials = 16384;          // latents x chunks: what the last block has to add up, times 4
constexpr int64_t kMaxChunks = 1024;             // of the rows; far below the limit of 65535 on gridDim.y

struct Grid {
  int64_t quads, columns, chunks;
};

// Depends on the shape alone, so that sums do too.
Grid grid_for(int64_t batch, int64_t k) {
  Grid g;
  g.quads = (k + 3) / 4;
  g.columns = (g.quads + kQuadsX - 1) / kQuadsX;
  if (g.columns < 1) g.columns = 1;
  g.chunks = (batch + kRowsY - 1) / kRowsY;
  const int64_t few = kMaxPartials / (k > 1 ? k : 1);
  if (g.chunks > few) g.chunks = few;
  if (g.chunks > kMaxChunks) g.chunks = kMaxChunks;
  if (g.chunks < 1) g.chunks = 1;
  return g;
}

dim3 dims(const Grid& g) { return dim3(static_cast<unsigned int>(g.columns), static_cast<unsigned int>(g.chunks)); }

// The elements a thread reads or writes: latents [first, first + n) of a row, as one vector where that is aligned.
template <class T>
__device__ __forceinline__ void load_quad(const T* row, int64_t first, int n, bool vector,
                                          typename Arithmetic<T>::type (&out)[4]) {
  if (vector) {
    const Pack<T, 4> p = *reinterpret_cast<const Pack<T, 4>*>(row + first);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = Element<T>::get(p.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) out[j] = Element<T>::get(row[first + j]);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_quad(T* row, int64_t first, int n, bool vector,
                                           const typename Arithmetic<T>::type (&values)[4]) {
  if (vector) {
    Pack<T, 4> p;
#pragma unroll
    for (int j = 0; j < 4; ++j) p.v[j] = Element<T>::put(values[j]);
    *reinterpret_cast<Pack<T, 4>*>(row + first) = p;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) row[first + j] = Element<T>::put(values[j]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs args, int64_t quads, bool vector) {
  using A = typename Arithmetic<T>::type;
  const int64_t k = args.k;
  const int x = threadIdx.x % kQuadsX, y = threadIdx.x / kQuadsX;
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kQuadsX + x;
  const int64_t first = 4 * quad;
  const int n = quad < quads ? (k - first < 4 ? static_cast<int>(k - first) : 4) : 0;
  // Every block reads the generator before it draws its ticket, so the last block may advance it.
  const RngState rng{args.rng[0], args.rng[1]};

  double sums[4][4] = {};  // mu, mu^2, sigma^2, kl of each latent
  if (n > 0) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kRowsY;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRowsY + y; row < args.batch; row += step) {
      A mu[4] = {}, log_sigma[4] = {}, z[4] = {};
      load_quad(static_cast<const T*>(args.mu.data) + row * args.mu.stride, first, n, vector, mu);
      load_quad(static_cast<const T*>(args.log_sigma.data) + row * args.log_sigma.stride, first, n, vector, log_sigma);
      const Normals eps = normals(philox_quad(rng, args.first_sample + row, quad));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Latent<A> latent = sample_latent<A>(mu[j], log_sigma[j], static_cast<A>(eps.n[j]));
        z[j] = latent.z;
        const double m = static_cast<double>(mu[j]);
        sums[0][j] += m;
        sums[1][j] += m * m;
        sums[2][j] += static_cast<double>(latent.sigma2);
        sums[3][j] += static_cast<double>(latent.kl);
      }
      store_quad(static_cast<T*>(args.z) + row * k, first, n, vector, z);
    }
  }

  // Over the block's rows, one statistic at a time, then to the chunk's line of the partial sums [chunks, 4, k].
  __shared__ double shared[kRowsY][kQuadsX * 4 + 1];
  double* partials = scratch_partials(args.scratch);
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) shared[y][4 * x + j] = sums[s][j];
    __syncthreads();
    const int64_t latent = static_cast<int64_t>(blockIdx.x) * (kQuadsX * 4) + threadIdx.x;
    if (threadIdx.x < kQuadsX * 4 && latent < k) {
      double sum = 0.0;
      for (int r = 0; r < kRowsY; ++r) sum += shared[r][threadIdx.x];
      partials[(static_cast<int64_t>(blockIdx.y) * 4 + s) * k + latent] = sum;
    }
    __syncthreads();
  }
  if (!is_last_block(scratch_ticket(args.scratch), gridDim.x * gridDim.y)) return;

  constexpr bool is_double = sizeof(A) == 8;
  A* moments = static_cast<A*>(args.moments);
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < 4 * k; i += kThreads) {
    double sum = 0.0;
    for (int64_t c = 0; c < gridDim.y; ++c) sum += __ldcg(&partials[c * 4 * k + i]);
    moments[i] = static_cast<A>(sum);
    if (i >= 3 * k) total += sum;
  }
  const double kl = block_sum(total);
  if (threadIdx.x != 0) return;
  store_scalar(args.kl, is_double, kl);
  args.state[0] = rng.seed;
  args.state[1] = rng.offset;
  if (args.advance) args.rng[1] = rng.offset + 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sample_grad_kernel(SampleGradArgs args, int64_t quads, bool vector) {
  using A = typename Arithmetic<T>::type;
  const int x = threadIdx.x % kQuadsX, y = threadIdx.x / kQuadsX;
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kQuadsX + x;
  if (quad >= quads) return;
  const int64_t k = args.k;
  const int64_t first = 4 * quad;
  const int n = k - first < 4 ? static_cast<int>(k - first) : 4;
  const RngState rng{args.state[0], args.state[1]};
  const A g_kl = args.grad_kl != nullptr ? *static_cast<const A*>(args.grad_kl) : A(0);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRowsY;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRowsY + y; row < args.batch; row += step) {
    A mu[4] = {}, log_sigma[4] = {}, g_z[4] = {}, g_mu[4], g_log_sigma[4];
    load_quad(static_cast<const T*>(args.mu.data) + row * args.mu.stride, first, n, vector, mu);
    load_quad(static_cast<const T*>(args.log_sigma.data) + row * args.log_sigma.stride, first, n, vector, log_sigma);
    if (args.grad_z != nullptr) load_quad(static_cast<const T*>(args.grad_z) + row * k, first, n, vector, g_z);
    const Normals eps = normals(philox_quad(rng, args.first_sample + row, quad));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      latent_gradient<A>(mu[j], log_sigma[j], static_cast<A>(eps.n[j]), g_z[j], g_kl, &g_mu[j], &g_log_sigma[j]);
    }
    store_quad(static_cast<T*>(args.grad_mu) + row * k, first, n, vector, g_mu);
    store_quad(static_cast<T*>(args.grad_log_sigma) + row * k, first, n, vector, g_log_sigma);
  }
}

__global__ void __launch_bounds__(kThreads) noise_kernel(int64_t* words, float* out, const int64_t* state,
                                                         int64_t rows, int64_t k, int64_t quads, int64_t first_sample) {
  const RngState rng{state[0], state[1]};
  const int64_t total = rows * quads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / quads, quad = i % quads;
    const Words w = philox_quad(rng, first_sample + row, quad);
    const Normals normal = normals(w);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t latent = 4 * quad + j;
      if (latent >= k) continue;
      if (words != nullptr) {
        words[row * k + latent] = static_cast<int64_t>(w.w[j]);
      } else {
        out[row * k + latent] = normal.n[j];
      }
    }
  }
}

// Whether every quad of every row can move as one vector.
template <class T>
bool quads_aligned(const Rows& mu, const Rows& log_sigma, const void* a, const void* b, const void* c, int64_t k) {
  return k % 4 == 0 && mu.stride % 4 == 0 && log_sigma.stride % 4 == 0 && aligned<T, 4>(mu.data) &&
         aligned<T, 4>(log_sigma.data) && aligned<T, 4>(a) && aligned<T, 4>(b) && aligned<T, 4>(c);
}

template <class F>
int with_type(DType type, const F& f) {
  switch (type) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    case DType::f16:
      return f.template operator()<__half>();
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace

int64_t sample_kl_scratch_bytes(int64_t batch, int64_t k) {
  return kTicketBytes + static_cast<int64_t>(sizeof(double)) * grid_for(batch, k).chunks * 4 * k;
}

int cuda_sample_kl(const SampleArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  BVAE_CUDA_TRY(cudaMemsetAsync(args.scratch, 0, kTicketBytes, stream));
  const Grid g = grid_for(args.batch, args.k);
  return with_type(args.type, [&]<class T>() {
    const bool vector = quads_aligned<T>(args.mu, args.log_sigma, args.z, nullptr, nullptr, args.k);
    sample_kernel<T><<<dims(g), kThreads, 0, stream>>>(args, g.quads, vector);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_sample_kl_backward(const SampleGradArgs& args, Launch launch) {
  if (args.batch == 0 || args.k == 0) return 0;
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  // Nothing is summed here, so the rows may be cut finer than in the forward pass.
  Grid g = grid_for(args.batch, args.k);
  const int64_t chunks = (args.batch + kRowsY - 1) / kRowsY;
  g.chunks = chunks < kMaxChunks ? chunks : kMaxChunks;
  return with_type(args.type, [&]<class T>() {
    const bool vector =
        quads_aligned<T>(args.mu, args.log_sigma, args.grad_z, args.grad_mu, args.grad_log_sigma, args.k);
    sample_grad_kernel<T><<<dims(g), kThreads, 0, stream>>>(args, g.quads, vector);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_noise(int64_t* words, float* out, const int64_t* rng, int64_t rows, int64_t k, int64_t first_sample,
               Launch launch) {
  if (rows == 0 || k == 0) return 0;
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const int64_t quads = (k + 3) / 4;
  const int64_t wanted = (rows * quads + kThreads - 1) / kThreads;
  const unsigned int blocks = static_cast<unsigned int>(wanted < 4096 ? wanted : 4096);
  noise_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(words, out, rng, rows, k, quads,
                                                                                  first_sample);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace bvae
