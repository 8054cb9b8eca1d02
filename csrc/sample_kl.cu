// Sampling, KL and moments on CUDA. A thread takes four neighbouring latents, which share one Philox call; a block takes
// 64 latents and a chunk of the rows.
#include <type_traits>

#include "device.cuh"
#include "philox.h"

namespace bvae {
namespace {

constexpr int kQuadsX = 16;                 // quads of latents across a block
constexpr int kLatentsX = 4 * kQuadsX;      // latents across a block: kThreads / 4, see the sums
constexpr int kRowsY = kThreads / kQuadsX;  // rows at a time
constexpr int kRun = 16;                    // rows of a thread whose sums stay in the arithmetic type
constexpr int kStatistics = 4;              // sums of mu, mu^2, sigma^2, kl
constexpr int64_t kGroup = 32;              // chunks whose sums are added up together
constexpr int64_t kMaxChunks = 65535;       // the limit on gridDim.y
constexpr int kSampleResident = 3;          // most blocks of the forward on a multiprocessor, see kForward
static_assert(kLatentsX * kStatistics == kThreads);

// Blocks of the forward that are resident on a multiprocessor at once, for its sums take many registers.
template <class T, bool vector>
constexpr int kForward = sizeof(T) == 8 ? 1 : (vector && sizeof(T) == 4 ? kSampleResident : 2);

// Rows a thread takes at once: their loads are under way together, and they share Philox's keys. Where that costs too
// many registers, one.
template <class T, bool vector>
constexpr int kTogether = vector && sizeof(T) < 8 ? 2 : 1;

struct Grid {
  int64_t quads, columns, chunks, groups;
  int64_t step;          // rows from one of a thread's rows to the next
  int64_t longer;        // a thread has `rows` rows, and one more if its first is before `longer`
  int rows;              // 2^31 of them would be 2^35 rows in all
};

// Depends on the shape and the device alone, so that sums do too.
Grid grid_for(int64_t batch, int64_t k, Launch launch, int resident) {
  Grid g;
  g.quads = (k + 3) / 4;
  g.columns = (k + kLatentsX - 1) / kLatentsX;
  if (g.columns < 1) g.columns = 1;
  const int64_t wave = static_cast<int64_t>(launch.multiprocessors) * resident / g.columns;
  g.chunks = (batch + kRowsY - 1) / kRowsY;
  if (g.chunks > wave) g.chunks = wave;
  if (g.chunks > kMaxChunks) g.chunks = kMaxChunks;
  if (g.chunks < 1) g.chunks = 1;
  g.groups = (g.chunks + kGroup - 1) / kGroup;
  g.step = g.chunks * kRowsY;
  g.rows = static_cast<int>(batch / g.step);
  g.longer = batch % g.step;
  return g;
}

// The scratch memory: tickets of every group and column and one more; sums of chunks [chunks, 4, k] and of groups
// [groups, 4, k]; KL of every column.
__host__ __device__ int64_t tickets(const Grid& g) { return g.columns * g.groups + g.columns + 1; }
__host__ __device__ int64_t ticket_bytes(const Grid& g) { return (tickets(g) * static_cast<int64_t>(sizeof(unsigned int)) + 15) / 16 * 16; }

dim3 dims(const Grid& g) { return dim3(static_cast<unsigned int>(g.columns), static_cast<unsigned int>(g.chunks)); }

// Bytes from one of a thread's rows to the next: a kernel's arguments can be added as they are, what it computes takes
// registers.
struct Steps {
  int64_t mu, log_sigma, dense;  // dense: of the matrices whose rows are k apart

  Steps(const Grid& g, int64_t mu_stride, int64_t log_sigma_stride, int64_t k, size_t size)
      : mu(g.step * mu_stride * size), log_sigma(g.step * log_sigma_stride * size), dense(g.step * k * size) {}
};

template <class T>
__device__ __forceinline__ void advance(T*& p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  p = reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);  // by way of an integer, nvcc forgets that p is global
}

// The n elements from p on that a thread reads or writes of a row; where they are aligned, four as one vector.
template <bool vector, class T>
__device__ __forceinline__ void load_quad(const T* p, int n, typename Arithmetic<T>::type (&out)[4]) {
  if constexpr (vector) {
    const Pack<T, 4> pack = load_pack<T, 4>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = Element<T>::get(pack.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) out[j] = Element<T>::get(p[j]);
    }
  }
}

template <bool vector, class T>
__device__ __forceinline__ void store_quad(T* p, int n, const typename Arithmetic<T>::type (&values)[4]) {
  if constexpr (vector) {
    Pack<T, 4> pack;
#pragma unroll
    for (int j = 0; j < 4; ++j) pack.v[j] = Element<T>::put(values[j]);
    store_pack<T, 4>(p, pack);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) p[j] = Element<T>::put(values[j]);
    }
  }
}

// The sum of `count` values that other blocks wrote, `stride` apart, in order.
__device__ __forceinline__ double add_lines(const double* values, int64_t count, int64_t stride) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += __ldcg(&values[i * stride]);
  return sum;
}

template <class T, bool vector>
__global__ void __launch_bounds__(kThreads, kForward<T, vector>) sample_kernel(SampleArgs args, Grid grid, Steps by) {
  using A = typename Arithmetic<T>::type;
  const int64_t k = args.k;
  const int x = threadIdx.x % kQuadsX, y = threadIdx.x / kQuadsX;
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kQuadsX + x;
  const int64_t first = 4 * quad;
  const int n = quad < grid.quads ? (k - first < 4 ? static_cast<int>(k - first) : 4) : 0;
  // Every block reads the generator before it draws its tickets, so the last block may advance it.
  const RngState rng{args.rng[0], args.rng[1]};

  // Sixteen sums in double would take a third of the registers, and eight instructions an element. So a thread adds up
  // kRun rows in A, and such runs in double, in its own column of shared memory.
  __shared__ double totals[kStatistics * 4][kThreads + 4];  // 4 more: the threads that add it up meet other banks
#pragma unroll
  for (int i = 0; i < kStatistics * 4; ++i) totals[i][threadIdx.x] = 0.0;

  const int64_t row = static_cast<int64_t>(blockIdx.y) * kRowsY + y;
  int rows_left = n > 0 ? grid.rows + (row < grid.longer) : 0;
  if (rows_left > 0) {
    constexpr int together = kTogether<T, vector>;
    int64_t sample = args.first_sample + row;
    const T* mu_at = static_cast<const T*>(args.mu.data) + row * args.mu.stride + first;
    const T* log_sigma_at = static_cast<const T*>(args.log_sigma.data) + row * args.log_sigma.stride + first;
    T* z_at = static_cast<T*>(args.z) + row * k + first;
    A sums[3][4];  // of mu, mu^2 and sigma^2
    A rest[4];     // of the part of kl that is not mu^2 / 2

    // The next `rows` rows of this thread.
    auto take = [&]<int rows>() {
      A mu[rows][4] = {}, log_sigma[rows][4] = {};
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        load_quad<vector>(mu_at, n, mu[r]);
        load_quad<vector>(log_sigma_at, n, log_sigma[r]);
        advance(mu_at, by.mu);
        advance(log_sigma_at, by.log_sigma);
      }
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const Normals eps = normals(philox_quad(rng, sample, quad));
        sample += grid.step;
        A z[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Latent<A> latent = sample_latent<A>(mu[r][j], log_sigma[r][j], static_cast<A>(eps.n[j]));
          z[j] = latent.z;
          sums[0][j] += mu[r][j];
          sums[1][j] = add_square(mu[r][j], sums[1][j]);
          sums[2][j] = add_square(latent.sigma, sums[2][j]);
          rest[j] += latent.rest;
        }
        store_quad<vector>(z_at, n, z);
        advance(z_at, by.dense);
      }
    };
    for (; rows_left > 0; rows_left -= kRun) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[0][j] = sums[1][j] = sums[2][j] = rest[j] = A(0);
      int left = rows_left < kRun ? rows_left : kRun;
      if constexpr (together > 1) {
#pragma unroll 1
        for (; left >= together; left -= together) take.template operator()<together>();
      }
#pragma unroll 1
      for (; left > 0; --left) take.template operator()<1>();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int s = 0; s < 3; ++s) totals[4 * s + j][threadIdx.x] += static_cast<double>(sums[s][j]);
        totals[4 * 3 + j][threadIdx.x] += 0.5 * static_cast<double>(sums[1][j]) + static_cast<double>(rest[j]);
      }
    }
  }

  // Over the block's rows: from here on, a thread has one statistic of one latent.
  __syncthreads();
  const int statistic = threadIdx.x / kLatentsX;
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * kLatentsX + threadIdx.x % kLatentsX;
  const int64_t at = statistic * k + latent, line = 4 * k;
  const bool mine = latent < k;
  double sum = 0.0;
#pragma unroll
  for (int r = 0; r < kRowsY; ++r) {
    const int in_row = threadIdx.x % kLatentsX;
    sum += totals[4 * statistic + in_row % 4][r * kQuadsX + in_row / 4];
  }

  // Over the chunks of a group, the groups, the columns; the last block of each goes on.
  unsigned int* ticket = scratch_ticket(args.scratch);
  double* chunk_sums = reinterpret_cast<double*>(static_cast<char*>(args.scratch) + ticket_bytes(grid));
  double* group_sums = chunk_sums + grid.chunks * line;
  double* column_kl = group_sums + grid.groups * line;
  if (grid.chunks > 1) {
    const int64_t group = blockIdx.y / kGroup;
    const int64_t left = grid.chunks - group * kGroup;
    const int64_t lines = left < kGroup ? left : kGroup;
    if (mine) chunk_sums[blockIdx.y * line + at] = sum;
    if (!is_last_block(&ticket[blockIdx.x * grid.groups + group], static_cast<unsigned int>(lines))) return;
    if (mine) sum = add_lines(chunk_sums + group * kGroup * line + at, lines, line);
    if (grid.groups > 1) {
      if (mine) group_sums[group * line + at] = sum;
      ticket += grid.columns * grid.groups;
      if (!is_last_block(&ticket[blockIdx.x], static_cast<unsigned int>(grid.groups))) return;
      if (mine) sum = add_lines(group_sums + at, grid.groups, line);
    }
  }
  constexpr bool is_double = sizeof(A) == 8;
  if (mine) static_cast<A*>(args.moments)[at] = static_cast<A>(sum);
  double kl = block_sum(mine && statistic == 3 ? sum : 0.0);
  if (grid.columns > 1) {
    if (threadIdx.x == 0) column_kl[blockIdx.x] = kl;
    ticket = scratch_ticket(args.scratch) + grid.columns * (grid.groups + 1);
    if (!is_last_block(ticket, static_cast<unsigned int>(grid.columns))) return;
    double part = 0.0;
    for (int64_t c = threadIdx.x; c < grid.columns; c += kThreads) part += __ldcg(&column_kl[c]);
    kl = block_sum(part);  // is_last_block has synchronised since the first use of its shared memory
  }
  if (threadIdx.x != 0) return;
  store_scalar(args.kl, is_double, kl);
  args.state[0] = rng.seed;
  args.state[1] = rng.offset;
  if (args.advance) args.rng[1] = rng.offset + 1;
}

// per_latent: the gradient of kl has k elements. A parameter of the template, because four numbers take more registers
// than one.
template <class T, bool vector, bool per_latent>
__global__ void __launch_bounds__(kThreads, kBounds<T>) sample_grad_kernel(SampleGradArgs args, Grid grid, Steps by) {
  using A = typename Arithmetic<T>::type;
  const int x = threadIdx.x % kQuadsX, y = threadIdx.x / kQuadsX;
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kQuadsX + x;
  if (quad >= grid.quads) return;
  const int64_t k = args.k;
  const int64_t first = 4 * quad;
  const int n = k - first < 4 ? static_cast<int>(k - first) : 4;
  const RngState rng{args.state[0], args.state[1]};
  A g_kl[per_latent ? 4 : 1] = {};
  if constexpr (per_latent) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < n) g_kl[j] = static_cast<const A*>(args.grad_kl)[first + j];
    }
  } else {
    if (args.grad_kl != nullptr) g_kl[0] = *static_cast<const A*>(args.grad_kl);
  }
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kRowsY + y;
  int left = grid.rows + (row < grid.longer);
  if (left == 0) return;
  int64_t sample = args.first_sample + row;
  const T* mu_at = static_cast<const T*>(args.mu.data) + row * args.mu.stride + first;
  const T* log_sigma_at = static_cast<const T*>(args.log_sigma.data) + row * args.log_sigma.stride + first;
  const T* g_z_at = static_cast<const T*>(args.grad_z);
  if (g_z_at != nullptr) g_z_at += row * k + first;
  T* g_mu_at = static_cast<T*>(args.grad_mu) + row * k + first;
  T* g_log_sigma_at = static_cast<T*>(args.grad_log_sigma) + row * k + first;

  // The next `rows` rows of this thread.
  auto take = [&]<int rows>() {
    A mu[rows][4] = {}, log_sigma[rows][4] = {}, g_z[rows][4] = {};
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      load_quad<vector>(mu_at, n, mu[r]);
      load_quad<vector>(log_sigma_at, n, log_sigma[r]);
      advance(mu_at, by.mu);
      advance(log_sigma_at, by.log_sigma);
      if (g_z_at != nullptr) {
        load_quad<vector>(g_z_at, n, g_z[r]);
        advance(g_z_at, by.dense);
      }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const Normals eps = normals(philox_quad(rng, sample, quad));
      sample += grid.step;
      A g_mu[4], g_log_sigma[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        latent_gradient<A>(mu[r][j], log_sigma[r][j], static_cast<A>(eps.n[j]), g_z[r][j], g_kl[per_latent ? j : 0],
                           &g_mu[j], &g_log_sigma[j]);
      }
      store_quad<vector>(g_mu_at, n, g_mu);
      store_quad<vector>(g_log_sigma_at, n, g_log_sigma);
      advance(g_mu_at, by.dense);
      advance(g_log_sigma_at, by.dense);
    }
  };
  constexpr int together = kTogether<T, vector>;
  if constexpr (together > 1) {
#pragma unroll 1
    for (; left >= together; left -= together) take.template operator()<together>();
  }
#pragma unroll 1
  for (; left > 0; --left) take.template operator()<1>();
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

int64_t sample_kl_scratch_bytes(int64_t batch, int64_t k, Launch launch) {
  const Grid g = grid_for(batch, k, launch, kSampleResident);  // a grid of fewer blocks needs less
  return ticket_bytes(g) + static_cast<int64_t>(sizeof(double)) * ((g.chunks + g.groups) * 4 * k + g.columns);
}

int cuda_sample_kl(const SampleArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_type(args.type, [&]<class T>() {
    const auto run = [&]<bool vector>() {
      const Grid g = grid_for(args.batch, args.k, launch, kForward<T, vector>);
      BVAE_CUDA_TRY(cudaMemsetAsync(args.scratch, 0, static_cast<size_t>(ticket_bytes(g)), stream));
      const Steps by(g, args.mu.stride, args.log_sigma.stride, args.k, sizeof(T));
      sample_kernel<T, vector><<<dims(g), kThreads, 0, stream>>>(args, g, by);
      return static_cast<int>(cudaGetLastError());
    };
    const bool vector = quads_aligned<T>(args.mu, args.log_sigma, args.z, nullptr, nullptr, args.k);
    return vector ? run.template operator()<true>() : run.template operator()<false>();
  });
}

int cuda_sample_kl_backward(const SampleGradArgs& args, Launch launch) {
  if (args.batch == 0 || args.k == 0) return 0;
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const Grid g = grid_for(args.batch, args.k, launch, kResident);
  return with_type(args.type, [&]<class T>() {
    const Steps by(g, args.mu.stride, args.log_sigma.stride, args.k, sizeof(T));
    const auto run = [&]<bool vector>() {
      if (args.per_latent) {
        sample_grad_kernel<T, vector, true><<<dims(g), kThreads, 0, stream>>>(args, g, by);
      } else {
        sample_grad_kernel<T, vector, false><<<dims(g), kThreads, 0, stream>>>(args, g, by);
      }
      return static_cast<int>(cudaGetLastError());
    };
    const bool vector =
        quads_aligned<T>(args.mu, args.log_sigma, args.grad_z, args.grad_mu, args.grad_log_sigma, args.k);
    return vector ? run.template operator()<true>() : run.template operator()<false>();
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
