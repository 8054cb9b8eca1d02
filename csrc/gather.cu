// Batch gather on CUDA: 16 bytes of one output image a thread. Writes are vectors; reads are too, except in mirrored
// images, where they come from the cache.
#include <cassert>

#include "device.cuh"

namespace bvae {
namespace {

// I counts packs of n elements: 32 bits where they are enough, for their divisions are much cheaper and take few
// registers.
template <class I>
constexpr int kGatherResident = sizeof(I) == 4 ? 8 : kResident;

template <class T, int n, class I>
__global__ void __launch_bounds__(kThreads, kGatherResident<I>) gather_kernel(GatherArgs args, I packs, I total) {
  using A = typename Arithmetic<T>::type;
  // Within an image 32 bits are always enough (gather.cpp checks).
  const uint32_t width = static_cast<uint32_t>(args.width), channels = static_cast<uint32_t>(args.channels);
  const uint32_t line = width * channels;
  const int64_t image = args.height * line;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t b = i / packs;
    const uint32_t at = static_cast<uint32_t>(i - static_cast<I>(b) * packs) * n;
    const int64_t source = args.index[b];
    assert(source >= 0 && source < args.images && "bvae::gather: index out of range");
    const uint8_t* from = args.data + source * image;
    Pack<uint8_t, n> row;
    if (args.flip == nullptr || !args.flip[b]) {
      row = load_pack<uint8_t, n>(from + at);
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
    for (int j = 0; j < n; ++j) x.v[j] = Element<T>::put(unit_value<A>(row.v[j]));
    store_pack<uint8_t, n>(args.rows + b * image + at, row);
    store_pack<T, n>(static_cast<T*>(args.x) + b * image + at, x);
  }
}

template <class T, int n, class I>
void launch_counted(const GatherArgs& args, I packs, I total, Launch launch) {
  const unsigned int blocks = one_wave(total, launch, kGatherResident<I>);
  gather_kernel<T, n, I><<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(args, packs, total);
}

template <class T, int n>
void launch_packs(const GatherArgs& args, int64_t packs, Launch launch) {
  const int64_t total = args.batch * packs;
  if (total < INT32_MAX) {  // half of what uint32_t holds, so that i + step cannot wrap
    launch_counted<T, n, uint32_t>(args, static_cast<uint32_t>(packs), static_cast<uint32_t>(total), launch);
  } else {
    launch_counted<T, n, int64_t>(args, packs, total, launch);
  }
}

template <class T>
int launch_gather(const GatherArgs& args, Launch launch) {
  const int64_t image = args.height * args.width * args.channels;
  constexpr int n = kVector<T>;
  if (image % n == 0 && aligned<uint8_t, n>(args.data) && aligned<uint8_t, n>(args.rows) && aligned<T, n>(args.x)) {
    launch_packs<T, n>(args, image / n, launch);
  } else {
    launch_packs<T, 1>(args, image, launch);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_gather(const GatherArgs& args, Launch launch) {
  if (args.batch == 0 || args.height * args.width * args.channels == 0) return 0;
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  switch (args.type) {
    case DType::f32:
      return launch_gather<float>(args, launch);
    case DType::f64:
      return launch_gather<double>(args, launch);
    case DType::bf16:
      return launch_gather<__nv_bfloat16>(args, launch);
    case DType::f16:
      return launch_gather<__half>(args, launch);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace bvae
