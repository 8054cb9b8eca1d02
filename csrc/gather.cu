// Batch gather on CUDA: 16 bytes of one output image a thread. Writes are vectors; reads are too, except in mirrored
// images, where they come from the cache.
#include <cassert>

#include "device.cuh"

namespace bvae {
namespace {

// Division by a number known at launch, exact for n < 2^31: with 2^(l-1) < d <= 2^l, the multiplier exceeds
// 2^(31+l) / d by at most 1, so the quotient n / d by less than 1 / d (Granlund and Montgomery, PLDI 1994). A division
// by a variable takes about twenty instructions.
struct Divisor {
  uint32_t multiplier;
  int shift;

  explicit Divisor(uint32_t d) : shift(31) {
    while ((uint64_t{1} << (shift - 31)) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / d + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

struct Divisors {
  Divisor packs, line, channels;  // the first for packs counted in 32 bits; the others divide within an image
};

// I counts packs of n elements: 32 bits where they are enough, for they are divided by a multiplication and take
// few registers.
template <class I>
constexpr int kGatherResident = sizeof(I) == 4 ? 8 : kResident;

template <class T, int n, class I>
__global__ void __launch_bounds__(kThreads, kGatherResident<I>) gather_kernel(GatherArgs args, I packs, I total,
                                                                               Divisors by) {
  using A = typename Arithmetic<T>::type;
  // Within an image 32 bits are always enough (gather.cpp checks).
  const uint32_t width = static_cast<uint32_t>(args.width), channels = static_cast<uint32_t>(args.channels);
  const uint32_t line = width * channels;
  const int64_t image = args.height * line;
  const I step = static_cast<I>(gridDim.x) * kThreads;
  for (I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    int64_t b;
    if constexpr (sizeof(I) == 4) {
      b = by.packs.divide(i);
    } else {
      b = i / packs;
    }
    const uint32_t at = static_cast<uint32_t>(i - static_cast<I>(b) * packs) * n;
    const int64_t chosen = args.index[b];
    assert(chosen >= 0 && chosen < args.images && "bvae::gather: index out of range");
    const uint8_t* from = args.data + chosen * image;
    Pack<uint8_t, n> row;
    if (args.flip == nullptr || !args.flip[b]) {
      row = load_pack<uint8_t, n>(from + at);
    } else {
      const uint32_t in_line = at - by.line.divide(at) * line;
      uint32_t w = by.channels.divide(in_line);
      uint32_t c = in_line - w * channels;
      uint32_t source = (at - in_line) + (width - 1 - w) * channels + c;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        row.v[j] = from[source++];
        if (++c == channels) {
          c = 0;
          source -= 2 * channels;
          if (++w == width) {
            w = 0;
            source += 2 * line;
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
  const Divisors by{Divisor(static_cast<uint32_t>(packs)), Divisor(static_cast<uint32_t>(args.width * args.channels)),
                    Divisor(static_cast<uint32_t>(args.channels))};
  gather_kernel<T, n, I><<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(args, packs, total, by);
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
