// What sums over channels on CUDA. Batch norm with ReLU: a kernel for sums, whose last block makes of them what a channel
// needs, and one that writes the images, each way; the ends of residual blocks; ReLUs of dense layers. All are
// [rows, channels]: a thread keeps to its channels and walks down the rows.
#include "device.cuh"

namespace bvae {
namespace {

constexpr int kNormResident = 2;  // blocks a multiprocessor: what a thread knows of its channels takes registers
constexpr int kColumns = 32;      // threads side by side at most: half a kilobyte of a row, a warp's worth
constexpr int kRowsEach = 8;      // rows a thread should have, for the last block to have few partial sums
constexpr int kMostRows = 64;     // and the most, for their sums stay in float

// How the threads of a grid lie over rows and channels: blockDim.x = columns x rows of threads; grid (blocks, slabs of
// columns).
struct Columns {
  int shift;  // 2^shift columns
  int slabs;
  int64_t blocks;
};

template <int n>
Columns columns_for(int64_t rows, int64_t channels, Launch launch, bool sums) {
  Columns c{};
  while ((1 << c.shift) < kColumns && (n << c.shift) < channels) ++c.shift;
  c.slabs = static_cast<int>((channels + (n << c.shift) - 1) / (n << c.shift));
  const int64_t together = kThreads >> c.shift;  // rows a block takes at once
  const int64_t wanted = (rows + together * kRowsEach - 1) / (together * kRowsEach);
  const int64_t most = static_cast<int64_t>(launch.multiprocessors) * kNormResident / c.slabs;
  c.blocks = wanted < most ? wanted : most;
  const int64_t least = sums ? (rows + together * kMostRows - 1) / (together * kMostRows) : 1;
  c.blocks = c.blocks < least ? least : c.blocks;
  return c;
}

dim3 dims(const Columns& c) { return {static_cast<unsigned int>(c.blocks), static_cast<unsigned int>(c.slabs)}; }

// A thread's channels and rows.
template <int n>
struct Place {
  int channel;  // the first of n
  bool inside;
  int64_t row, step;

  __device__ __forceinline__ Place(const Columns& at, int64_t channels) {
    const int column = threadIdx.x & ((1 << at.shift) - 1);
    const int64_t first = ((static_cast<int64_t>(blockIdx.y) << at.shift) + column) * n;
    channel = static_cast<int>(first);
    inside = first < channels;  // where n > 1 it divides the number of channels
    row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> at.shift;
    step = (static_cast<int64_t>(gridDim.x) * kThreads) >> at.shift;
  }
};

template <int n>
struct Numbers {
  float v[n];
};

template <int n>
__device__ __forceinline__ Numbers<n> numbers(const float* per_channel, int channel) {
  Numbers<n> out;
#pragma unroll
  for (int j = 0; j < n; ++j) out.v[j] = per_channel[channel + j];
  return out;
}

// Calls take(row, ...) for the thread's rows, with `tensors` packs each: of several rows all are loaded before the first
// is used.
template <class T, int n, int ahead, int tensors, class F>
__device__ __forceinline__ void over_rows(const Place<n>& place, int64_t rows, int64_t channels,
                                          const T* const (&from)[tensors], const F& take) {
  if (!place.inside) return;
  for (int64_t row = place.row; row < rows; row += ahead * place.step) {
    Pack<T, n> packs[ahead][tensors];
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      const int64_t next = row + a * place.step;
#pragma unroll
      for (int t = 0; t < tensors; ++t) {
        if (next < rows && from[t] != nullptr) packs[a][t] = load_pack<T, n>(from[t] + next * channels + place.channel);
      }
    }
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      const int64_t next = row + a * place.step;
      if (next < rows) take(next * channels + place.channel, packs[a]);
    }
  }
}

// Adds up each thread's sums over the block and then, in the last block of a slab, over the grid: finish(channel,
// double[sums]) for each channel, in one thread. The order of all additions is fixed.
template <int sums, int n, class Finish>
__device__ __forceinline__ void finish_columns(const float (&mine)[sums][n], const Columns& at, int64_t channels,
                                               double* partials, unsigned int* counters, const Finish& finish) {
  constexpr int kMost = sums * kColumns * n, kWarps = kThreads / 32;
  __shared__ float warps[kWarps][kMost];
  __shared__ double groups[kThreads];
  __shared__ double totals[kMost];
  const int columns = 1 << at.shift, width = columns * n, count = sums * width;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < sums; ++k) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      float sum = mine[k][j];
      for (int step = 16; step >= columns; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
      if (lane < columns) warps[warp][k * width + lane * n + j] = sum;
    }
  }
  __syncthreads();
  partials += static_cast<int64_t>(blockIdx.y) * gridDim.x * count;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w][i];
    partials[static_cast<int64_t>(blockIdx.x) * count + i] = sum;
  }
  if (!is_last_block(&counters[blockIdx.y], gridDim.x)) return;
  if (threadIdx.x == 0) counters[blockIdx.y] = 0;

  // Several threads a sum where there are few, each with a part of the blocks.
  const int each = count < kThreads ? count : kThreads, parts = kThreads / each;
  const int part = static_cast<int>(threadIdx.x) / each, place = static_cast<int>(threadIdx.x) % each;
  for (int first = 0; first < count; first += each) {
    const int i = first + place;
    double sum = 0.0;
    if (part < parts && i < count) {
#pragma unroll 8
      for (int64_t b = part; b < gridDim.x; b += parts) sum += __ldcg(&partials[b * count + i]);
    }
    groups[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && i < count) {
      for (int p = 1; p < parts; ++p) sum += groups[p * each + place];
      totals[i] = sum;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * width + i;
    if (channel >= channels) continue;
    double of_channel[sums];
#pragma unroll
    for (int k = 0; k < sums; ++k) of_channel[k] = totals[k * width + i];
    finish(channel, of_channel);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) moments_kernel(NormArgs args, Columns at) {
  const T* x = static_cast<const T*>(args.x);
  const Place<n> place(at, args.channels);
  // About the first pixel rather than about zero: a mean far from zero would cancel in the variance.
  float origin[n] = {}, sums[2][n] = {};
  if (place.inside) {
#pragma unroll
    for (int j = 0; j < n; ++j) origin[j] = Element<T>::get(x[place.channel + j]);
  }
  over_rows<T, n, 4, 1>(place, args.rows, args.channels, {x}, [&](int64_t, const Pack<T, n>(&pack)[1]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float d = Element<T>::get(pack[0].v[j]) - origin[j];
      sums[0][j] += d;
      sums[1][j] += d * d;
    }
  });
  finish_columns<2, n>(sums, at, args.channels, static_cast<double*>(args.scratch), args.counters,
                       [&](int64_t c, const double(&sum)[2]) {
                         const double count = static_cast<double>(args.rows);
                         const ChannelMoments batch =
                             channel_moments(Element<T>::get(x[c]), sum[0], sum[1], count);
                         args.statistics[c] = static_cast<float>(batch.mean);
                         args.statistics[args.channels + c] = inverse_deviation(batch.var, args.eps);
                         const double offset = args.offset != nullptr ? args.offset[c] : 0.0;
                         args.running_mean[c] = mixed(args.running_mean[c], batch.mean + offset, args.momentum);
                         args.running_var[c] =
                             mixed(args.running_var[c], unbiased(batch.var, count), args.momentum);
                         if (c == 0) *args.running_weight = mixed(*args.running_weight, 1.0, args.momentum);
                       });
}

// What both kernels that write images know of a thread's channels.
template <int n>
struct Scaling {
  Numbers<n> mean, scale, bias;

  __device__ __forceinline__ Scaling(const float* statistics, const float* weight, const float* given_bias,
                                     int64_t channels, int channel) {
    mean = numbers<n>(statistics, channel);
    scale = numbers<n>(statistics + channels, channel);
    bias = numbers<n>(given_bias, channel);
    const Numbers<n> w = numbers<n>(weight, channel);
#pragma unroll
    for (int j = 0; j < n; ++j) scale.v[j] *= w.v[j];
  }
};

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) scale_relu_kernel(NormArgs args, Columns at) {
  const Place<n> place(at, args.channels);
  if (!place.inside) return;
  const Scaling<n> of(args.statistics, args.weight, args.bias, args.channels, place.channel);
  T *y = static_cast<T*>(args.y), *through = static_cast<T*>(args.through);
  Numbers<n> offset{};
  if (through != nullptr) offset = numbers<n>(args.offset, place.channel);
  over_rows<T, n, 4, 1>(place, args.rows, args.channels, {static_cast<const T*>(args.x)},
                        [&](int64_t i, const Pack<T, n>(&pack)[1]) {
                          Pack<T, n> out;
#pragma unroll
                          for (int j = 0; j < n; ++j) {
                            const float d = Element<T>::get(pack[0].v[j]) - of.mean.v[j];
                            out.v[j] = Element<T>::put(relu(normalised(d, of.scale.v[j], of.bias.v[j])));
                          }
                          store_pack<T, n>(y + i, out);
                          if (through == nullptr) return;
#pragma unroll
                          for (int j = 0; j < n; ++j) {
                            out.v[j] = Element<T>::put(Element<T>::get(pack[0].v[j]) + offset.v[j]);
                          }
                          store_pack<T, n>(through + i, out);
                        });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Scratch memory of the backward pass: slope and constant of each channel, then the partial sums.
__host__ __device__ inline float* scratch_slope(void* scratch) { return static_cast<float*>(scratch); }
__host__ __device__ inline int64_t slope_bytes(int64_t channels) { return (2 * channels * 4 + 15) / 16 * 16; }

template <class T, int n, bool carried>
__global__ void __launch_bounds__(kThreads, kNormResident) gradient_moments_kernel(NormGradArgs args, Columns at) {
  constexpr int count = carried ? 3 : 2;
  const Place<n> place(at, args.channels);
  float sums[count][n] = {};
  if (place.inside) {
    const Scaling<n> of(args.statistics, args.weight, args.bias, args.channels, place.channel);
    over_rows<T, n, 2, 2>(place, args.rows, args.channels,
                          {static_cast<const T*>(args.grad), static_cast<const T*>(args.x)},
                          [&](int64_t, const Pack<T, n>(&pack)[2]) {
#pragma unroll
                            for (int j = 0; j < n; ++j) {
                              const float d = Element<T>::get(pack[1].v[j]) - of.mean.v[j];
                              const float g =
                                  passed_by_relu(Element<T>::get(pack[0].v[j]), d, of.scale.v[j], of.bias.v[j]);
                              sums[0][j] += g;
                              sums[1][j] += g * d;
                            }
                          });
  }
  if constexpr (carried) {  // in a loop of its own, which needs none of the registers of the first
    over_rows<T, n, 4, 1>(place, args.rows, args.channels, {static_cast<const T*>(args.grad_through)},
                          [&](int64_t, const Pack<T, n>(&pack)[1]) {
#pragma unroll
                            for (int j = 0; j < n; ++j) sums[2][j] += Element<T>::get(pack[0].v[j]);
                          });
  }
  float* slope = scratch_slope(args.scratch);
  double* partials = reinterpret_cast<double*>(static_cast<char*>(args.scratch) + slope_bytes(args.channels));
  finish_columns<count, n>(sums, at, args.channels, partials, args.counters,
                           [&](int64_t c, const double(&sum)[count]) {
                             const float invstd = args.statistics[args.channels + c];
                             const NormGradient g = norm_gradient(sum[0], sum[1], args.weight[c] * invstd, invstd,
                                                                  static_cast<double>(args.rows));
                             args.grad_bias[c] = g.bias;
                             args.grad_weight[c] = g.weight;
                             slope[c] = g.slope;
                             slope[args.channels + c] = g.constant;
                             if constexpr (carried) args.grad_offset[c] = static_cast<float>(sum[2]);
                           });
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) scale_relu_grad_kernel(NormGradArgs args, Columns at) {
  const Place<n> place(at, args.channels);
  if (!place.inside) return;
  const Scaling<n> of(args.statistics, args.weight, args.bias, args.channels, place.channel);
  const float* made = scratch_slope(args.scratch);
  const Numbers<n> slope = numbers<n>(made, place.channel), constant = numbers<n>(made + args.channels, place.channel);
  T* grad_x = static_cast<T*>(args.grad_x);
  const T* more = static_cast<const T*>(args.grad_through);
  over_rows<T, n, 2, 3>(place, args.rows, args.channels,
                        {static_cast<const T*>(args.grad), static_cast<const T*>(args.x), more},
                        [&](int64_t i, const Pack<T, n>(&pack)[3]) {
                          Pack<T, n> out;
#pragma unroll
                          for (int j = 0; j < n; ++j) {
                            const float d = Element<T>::get(pack[1].v[j]) - of.mean.v[j];
                            const float g =
                                passed_by_relu(Element<T>::get(pack[0].v[j]), d, of.scale.v[j], of.bias.v[j]);
                            float sum = norm_gradient_of_x(g, d, of.scale.v[j], slope.v[j], constant.v[j]);
                            if (more != nullptr) sum += Element<T>::get(pack[2].v[j]);
                            out.v[j] = Element<T>::put(sum);
                          }
                          store_pack<T, n>(grad_x + i, out);
                        });
}

// ---- the end of a residual block -----------------------------------------------------------------------------------

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) add_biased_kernel(AddArgs args, Columns at) {
  const Place<n> place(at, args.channels);
  if (!place.inside) return;
  Numbers<n> bias = numbers<n>(args.bias_a, place.channel);
  const Numbers<n> second = numbers<n>(args.bias_b, place.channel);
#pragma unroll
  for (int j = 0; j < n; ++j) bias.v[j] += second.v[j];
  T* to = static_cast<T*>(args.out);
  over_rows<T, n, 4, 2>(place, args.rows, args.channels, {static_cast<const T*>(args.a), static_cast<const T*>(args.b)},
                        [&](int64_t i, const Pack<T, n>(&pack)[2]) {
                          Pack<T, n> out;
#pragma unroll
                          for (int j = 0; j < n; ++j) {
                            const float sum = Element<T>::get(pack[0].v[j]) + Element<T>::get(pack[1].v[j]);
                            out.v[j] = Element<T>::put(sum + bias.v[j]);
                          }
                          store_pack<T, n>(to + i, out);
                        });
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) channel_sums_kernel(ChannelSumArgs args, Columns at) {
  const Place<n> place(at, args.channels);
  float sums[1][n] = {};
  over_rows<T, n, 4, 1>(place, args.rows, args.channels, {static_cast<const T*>(args.x)},
                        [&](int64_t, const Pack<T, n>(&pack)[1]) {
#pragma unroll
                          for (int j = 0; j < n; ++j) sums[0][j] += Element<T>::get(pack[0].v[j]);
                        });
  finish_columns<1, n>(sums, at, args.channels, static_cast<double*>(args.scratch), args.counters,
                       [&](int64_t c, const double(&sum)[1]) {
                         args.sums[c] = args.again[c] = static_cast<float>(sum[0]);
                       });
}

// ---- a dense layer's ReLU, backward ----------------------------------------------------------------------------------

template <class T, int n>
__global__ void __launch_bounds__(kThreads, kNormResident) relu_grad_kernel(ReluGradArgs args, Columns at) {
  const Place<n> place(at, args.channels);
  T* out = static_cast<T*>(args.out);
  float sums[1][n] = {};
  over_rows<T, n, 4, 2>(place, args.rows, args.channels, {static_cast<const T*>(args.grad), static_cast<const T*>(args.y)},
                        [&](int64_t i, const Pack<T, n>(&pack)[2]) {
                          Pack<T, n> passed;
#pragma unroll
                          for (int j = 0; j < n; ++j) {
                            const float g = relu_gradient(Element<T>::get(pack[0].v[j]), Element<T>::get(pack[1].v[j]));
                            sums[0][j] += g;
                            passed.v[j] = Element<T>::put(g);
                          }
                          store_pack<T, n>(out + i, passed);
                        });
  T* to = static_cast<T*>(args.sums);
  finish_columns<1, n>(sums, at, args.channels, static_cast<double*>(args.scratch), args.counters,
                       [&](int64_t c, const double(&sum)[1]) {
                         to[c] = Element<T>::put(static_cast<float>(sum[0]));
                       });
}

// Calls f.template operator()<T, n>() with n the elements a thread takes at once: one where a pixel's channels cannot
// be cut into vectors.
template <class F>
int with_vectors(DType type, int64_t channels, std::initializer_list<const void*> images, const F& f) {
  const auto choose = [&]<class T>() {
    constexpr int n = kVector<T>;
    bool vectors = channels % n == 0;
    for (const void* p : images) vectors = vectors && aligned<T, n>(p);
    return vectors ? f.template operator()<T, n>() : f.template operator()<T, 1>();
  };
  switch (type) {
    case DType::f32:
      return choose.template operator()<float>();
    case DType::bf16:
      return choose.template operator()<__nv_bfloat16>();
    case DType::f16:
      return choose.template operator()<__half>();
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

template <int n>
int64_t partial_bytes(int64_t rows, int64_t channels, Launch launch) {
  const Columns c = columns_for<n>(rows, channels, launch, true);
  return c.blocks * c.slabs * (static_cast<int64_t>(n) << c.shift) * 3 * static_cast<int64_t>(sizeof(double));
}

}  // namespace

int64_t batch_norm_scratch_bytes(int64_t rows, int64_t channels, Launch launch) {
  const int64_t sizes[] = {partial_bytes<1>(rows, channels, launch), partial_bytes<4>(rows, channels, launch),
                           partial_bytes<8>(rows, channels, launch)};
  int64_t most = 0;
  for (const int64_t size : sizes) most = size > most ? size : most;
  return slope_bytes(channels) + most;
}

int cuda_batch_norm_relu(const NormArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_vectors(args.type, args.channels, {args.x, args.y, args.through}, [&]<class T, int n>() {
    const Columns sums = columns_for<n>(args.rows, args.channels, launch, true);
    const Columns images = columns_for<n>(args.rows, args.channels, launch, false);
    moments_kernel<T, n><<<dims(sums), kThreads, 0, stream>>>(args, sums);
    BVAE_CUDA_TRY(cudaGetLastError());
    scale_relu_kernel<T, n><<<dims(images), kThreads, 0, stream>>>(args, images);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_batch_norm_relu_backward(const NormGradArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const auto images = {args.grad, args.grad_through, args.x, static_cast<const void*>(args.grad_x)};
  return with_vectors(args.type, args.channels, images, [&]<class T, int n>() {
    const Columns at = columns_for<n>(args.rows, args.channels, launch, true);
    const Columns over = columns_for<n>(args.rows, args.channels, launch, false);
    if (args.grad_offset != nullptr) {
      gradient_moments_kernel<T, n, true><<<dims(at), kThreads, 0, stream>>>(args, at);
    } else {
      gradient_moments_kernel<T, n, false><<<dims(at), kThreads, 0, stream>>>(args, at);
    }
    BVAE_CUDA_TRY(cudaGetLastError());
    scale_relu_grad_kernel<T, n><<<dims(over), kThreads, 0, stream>>>(args, over);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_add_biased(const AddArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_vectors(args.type, args.channels, {args.a, args.b, args.out}, [&]<class T, int n>() {
    const Columns at = columns_for<n>(args.rows, args.channels, launch, false);
    add_biased_kernel<T, n><<<dims(at), kThreads, 0, stream>>>(args, at);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_relu_grad(const ReluGradArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_vectors(args.type, args.channels, {args.grad, args.y, args.out}, [&]<class T, int n>() {
    const Columns at = columns_for<n>(args.rows, args.channels, launch, true);
    relu_grad_kernel<T, n><<<dims(at), kThreads, 0, stream>>>(args, at);
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_channel_sums(const ChannelSumArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_vectors(args.type, args.channels, {args.x}, [&]<class T, int n>() {
    const Columns at = columns_for<n>(args.rows, args.channels, launch, true);
    channel_sums_kernel<T, n><<<dims(at), kThreads, 0, stream>>>(args, at);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace bvae
