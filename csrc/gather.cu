// Batch gather on CUDA: eight neighbouring elements of one output image a thread. Writes are vectors; reads are too,
// except in mirrored images, where they come from the cache.
#include <cassert>

#include "device.cuh"

namespace bvae {
namespace {

template <class T, int n>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherArgs args, int64_t packs) {
  using A = typename Arithmetic<T>::type;
  // Within an image 32 bits are enough (gather.cpp checks), and their divisions are much cheaper.
  const uint32_t width = static_cast<uint32_t>(args.width), channels = static_cast<uint32_t>(args.channels);
  const uint32_t line = width * channels;
  const int64_t image = args.height * line;
  const int64_t total = args.batch * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t b = i / packs;
    const uint32_t at = static_cast<uint32_t>(i - b * packs) * n;
    const int64_t source = args.index[b];
    assert(source >= 0 && source < args.images && "bvae::gather: index out of range");
    const uint8_t* from = args.data + source * image;
    Pack<uint8_t, n> row;
    if (args.flip == nullptr || !args.flip[b]) {
      row = *reinterpret_cast<const Pack<uint8_t, n>*>(from + at);
    } else {
      uint32_t start = at / line * line;  // of the line that holds the output element
      uint32_t w = (at - start) / channels;
      uint32_t c = (at - start) % channels;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        row.v[j] = from[start + (width - 1 - w) * channels + c];
        if (++c == channels) {
          c = 0;
          if (++w == width) {
            w = 0;
            start += line;
          }
        }
      }
    }
    Pack<T, n> x;
#pragma unroll
    for (int j = 0; j < n; ++j) x.v[j] = Element<T>::put(target_value<A, uint8_t>(row.v[j]));
    *reinterpret_cast<Pack<uint8_t, n>*>(args.rows + b * image + at) = row;
    *reinterpret_cast<Pack<T, n>*>(static_cast<T*>(args.x) + b * image + at) = x;
  }
}

template <class T>
int launch_gather(const GatherArgs& args, cudaStream_t stream) {
  const int64_t image = args.height * args.width * args.channels;
  constexpr int n = 8;
  const bool vector = image % n == 0 && aligned<uint8_t, n>(args.data) && aligned<uint8_t, n>(args.rows) &&
                      aligned<T, n>(args.x);
  const int64_t packs = vector ? image / n : image;
  const int64_t wanted = (args.batch * packs + kThreads - 1) / kThreads;
  const unsigned int blocks = static_cast<unsigned int>(wanted < 8192 ? wanted : 8192);
  if (vector) {
    gather_kernel<T, n><<<blocks, kThreads, 0, stream>>>(args, packs);
  } else {
    gather_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(args, packs);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_gather(const GatherArgs& args, Launch launch) {
  if (args.batch == 0 || args.height * args.width * args.channels == 0) return 0;
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  switch (args.type) {
    case DType::f32:
      return launch_gather<float>(args, stream);
    case DType::f64:
      return launch_gather<double>(args, stream);
    case DType::bf16:
      return launch_gather<__nv_bfloat16>(args, stream);
    case DType::f16:
      return launch_gather<__half>(args, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace bvae
