// The balanced loss on CUDA: one pass for the sum of squares, whose last block also makes the loss and moves gamma2;
// one pass for the gradient.
#include "device.cuh"

namespace bvae {
namespace {

// Depends on the size and the device alone, so that sums do too.
unsigned int blocks_for(int64_t numel, Launch launch) { return one_wave((numel + 7) / 8, launch); }

template <class R, class T, bool logits>
__global__ void __launch_bounds__(kThreads, kBounds<R>) loss_kernel(LossArgs args, int64_t vectors) {
  using A = typename Arithmetic<R>::type;
  constexpr int n = kVector<R>, ahead = kAhead<R>;
  const R* recon = static_cast<const R*>(args.recon);
  const T* target = static_cast<const T*>(args.target);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;

  double sum = 0.0;
  for (int64_t i = thread; i < vectors; i += ahead * threads) {
    Pack<R, n> r[ahead];
    Pack<T, n> t[ahead];
#pragma unroll
    for (int v = 0; v < ahead; ++v) {
      if (i + v * threads < vectors) {
        r[v] = load_pack<R, n>(recon, i + v * threads);
        t[v] = load_pack<T, n>(target, i + v * threads);
      }
    }
#pragma unroll
    for (int v = 0; v < ahead; ++v) {
      if (i + v * threads < vectors) {
        A part = A(0);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A d = residual<logits>(static_cast<A>(Element<R>::get(r[v].v[j])), target_value<A, T>(t[v].v[j]));
          part = add_square(d, part);
        }
        sum += static_cast<double>(part);
      }
    }
  }
  // The tail, or everything where a pointer is not aligned and `vectors` is 0.
  for (int64_t i = vectors * n + thread; i < args.numel; i += threads) {
    const A d = residual<logits>(static_cast<A>(Element<R>::get(recon[i])), target_value<A, T>(target[i]));
    sum += static_cast<double>(d * d);
  }

  double* partials = scratch_partials(args.scratch);
  const double block = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = block;
  if (!is_last_block(scratch_ticket(args.scratch), gridDim.x)) return;

  double mine = 0.0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kThreads) mine += __ldcg(&partials[i]);
  const double sse = block_sum(mine);  // is_last_block has synchronised since the first use of its shared memory
  if (threadIdx.x != 0) return;
  constexpr bool is_double = sizeof(A) == 8;
  const LossParts parts = finish_loss(sse, load_scalar(args.kl, is_double), args.batch, args.numel, args.per_sample,
                                      args.state, args.stats, args.used);
  store_scalar(args.loss, is_double, parts.loss);
  store_scalar(args.sse, is_double, sse);
}

template <class R, class T, bool logits>
__global__ void __launch_bounds__(kThreads, kBounds<R>) loss_grad_kernel(LossGradArgs args, int64_t vectors) {
  using A = typename Arithmetic<R>::type;
  constexpr int n = kVector<R>, ahead = kAhead<R>;
  constexpr bool is_double = sizeof(A) == 8;
  const R* recon = static_cast<const R*>(args.recon);
  const T* target = static_cast<const T*>(args.target);
  R* grad = static_cast<R*>(args.grad_recon);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;

  // Every block makes the coefficient from the same device scalars: no extra launch, nothing read by the host. One
  // thread of it does, for a division of doubles is slow on many GPUs.
  __shared__ A shared_coefficient;
  if (threadIdx.x == 0) {
    const double g_loss = args.grad_loss != nullptr ? load_scalar(args.grad_loss, is_double) : 0.0;
    const double g_sse = args.grad_sse != nullptr ? load_scalar(args.grad_sse, is_double) : 0.0;
    const double batch = static_cast<double>(args.batch);
    shared_coefficient = static_cast<A>(loss_coefficient(g_loss, g_sse, args.used[0], batch));
    if (blockIdx.x == 0) {
      store_scalar(args.grad_kl, is_double, kl_coefficient(g_loss, args.kl_weight, args.used[1], args.batch));
    }
  }
  __syncthreads();
  const A coefficient = shared_coefficient;

  for (int64_t i = thread; i < vectors; i += ahead * threads) {
    Pack<R, n> r[ahead];
    Pack<T, n> t[ahead];
#pragma unroll
    for (int v = 0; v < ahead; ++v) {
      if (i + v * threads < vectors) {
        r[v] = load_pack<R, n>(recon, i + v * threads);
        t[v] = load_pack<T, n>(target, i + v * threads);
      }
    }
#pragma unroll
    for (int v = 0; v < ahead; ++v) {
      if (i + v * threads < vectors) {
        Pack<R, n> g;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const A slope =
              half_slope<logits>(static_cast<A>(Element<R>::get(r[v].v[j])), target_value<A, T>(t[v].v[j]));
          g.v[j] = Element<R>::put(coefficient * slope);
        }
        store_pack<R, n>(grad, g, i + v * threads);
      }
    }
  }
  for (int64_t i = vectors * n + thread; i < args.numel; i += threads) {
    const A slope = half_slope<logits>(static_cast<A>(Element<R>::get(recon[i])), target_value<A, T>(target[i]));
    grad[i] = Element<R>::put(coefficient * slope);
  }
}

__global__ void update_gamma2_kernel(float* gamma2, int64_t* skipped, const void* sse, bool sse_is_double,
                                     const void* count, bool count_is_double, double decay, double floor,
                                     bool monotone) {
  const double n = count_is_double ? *static_cast<const double*>(count)
                                   : static_cast<double>(*static_cast<const int64_t*>(count));
  if (n == 0.0) return;
  if (!move_gamma2(gamma2, load_scalar(sse, sse_is_double) / n, decay, floor, monotone)) *skipped += 1;
}

// Calls f.template operator()<R, T>() for the pair of element types; the pairs are those balanced_loss.cpp lets through.
template <class R, class F>
int with_target(DType recon, DType target, const F& f) {
  if (target == DType::u8) return f.template operator()<R, uint8_t>();
  if (target == recon) return f.template operator()<R, R>();
  if constexpr (sizeof(R) == 2) {
    if (target == DType::f32) return f.template operator()<R, float>();
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <class F>
int with_types(DType recon, DType target, const F& f) {
  switch (recon) {
    case DType::f32:
      return with_target<float>(recon, target, f);
    case DType::f64:
      return with_target<double>(recon, target, f);
    case DType::bf16:
      return with_target<__nv_bfloat16>(recon, target, f);
    case DType::f16:
      return with_target<__half>(recon, target, f);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

template <class R, class T>
int64_t vectors_of(const void* recon, const void* target, const void* grad, int64_t numel) {
  constexpr int n = kVector<R>;
  const bool ok = aligned<R, n>(recon) && aligned<T, n>(target) && aligned<R, n>(grad);
  return ok ? numel / n : 0;
}

}  // namespace

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_multiprocessors(int device, int* count) {
  BVAE_CUDA_TRY(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
  return 0;
}

int64_t balanced_loss_scratch_bytes(int64_t numel, Launch launch) {
  return kTicketBytes + static_cast<int64_t>(sizeof(double)) * blocks_for(numel, launch);
}

int cuda_balanced_loss(const LossArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  BVAE_CUDA_TRY(cudaMemsetAsync(args.scratch, 0, kTicketBytes, stream));
  return with_types(args.recon_type, args.target_type, [&]<class R, class T>() {
    const int64_t vectors = vectors_of<R, T>(args.recon, args.target, nullptr, args.numel);
    const unsigned int blocks = blocks_for(args.numel, launch);
    if (args.logits) {
      loss_kernel<R, T, true><<<blocks, kThreads, 0, stream>>>(args, vectors);
    } else {
      loss_kernel<R, T, false><<<blocks, kThreads, 0, stream>>>(args, vectors);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_balanced_loss_backward(const LossGradArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_types(args.recon_type, args.target_type, [&]<class R, class T>() {
    const int64_t vectors = vectors_of<R, T>(args.recon, args.target, args.grad_recon, args.numel);
    const unsigned int blocks = blocks_for(args.numel, launch);
    if (args.logits) {
      loss_grad_kernel<R, T, true><<<blocks, kThreads, 0, stream>>>(args, vectors);
    } else {
      loss_grad_kernel<R, T, false><<<blocks, kThreads, 0, stream>>>(args, vectors);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

int cuda_update_gamma2(float* gamma2, int64_t* skipped, const void* sse, bool sse_is_double, const void* count,
                       bool count_is_double, double decay, double floor, bool monotone, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  update_gamma2_kernel<<<1, 1, 0, static_cast<cudaStream_t>(launch.stream)>>>(gamma2, skipped, sse, sse_is_double,
                                                                              count, count_is_double, decay, floor,
                                                                              monotone);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace bvae
