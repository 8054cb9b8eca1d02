// The part of CUDA that csrc/*.cu use, for a C++ compiler on a machine without a GPU: the kernels run on the CPU, as
// tools/emulate_cuda.py builds them. It rewrites what is not C++: launches become cuda_emulation::kernel(...)(...), and
// a __shared__ variable becomes a reference into its block's memory. What a kernel needs and is not here belongs here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned int x, y;
};

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- the runtime's calls: nothing is asynchronous, there is one device ----------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

namespace cuda_emulation {

using Where = std::source_location;

struct Config {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// Runs `thread` for every thread of the grid.
void launch(const char* name, const Config& config, const std::function<void()>& thread);

template <class... P>
auto kernel(const char* name, void (*function)(P...), const Config& config) {
  return [=](std::type_identity_t<P>... args) { launch(name, config, [&] { function(args...); }); };
}

// The running block's memory for one declaration, which `key` stands for. At first every bit is set: NaNs, huge counts.
void* shared_memory(const void* key, size_t bytes);

template <class T>
T& shared(const void* key) {
  return *static_cast<T*>(shared_memory(key, sizeof(T)));
}

// The launch's dynamic shared memory in the running block.
void* dynamic_shared_memory();

// Ends the process and says which kernel, block and thread was running.
[[noreturn]] void fail(const char* what, Where where);

void barrier(Where where);

// Deposits `bytes` at `value`, waits for the lanes in `mask`, and replaces them by those of lane `source`.
void exchange(unsigned int mask, void* value, size_t bytes, int source, const char* what, Where where);

int lane();

template <class T>
T shuffle(unsigned int mask, T value, int source, int width, const char* what, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  // A source outside the segment of `width` lanes means one's own value.
  if (source < 0 || source >= 32 || source / width != lane() / width) source = lane();
  exchange(mask, &value, sizeof(T), source, what, where);
  return value;
}

}  // namespace cuda_emulation

inline void __syncthreads(cuda_emulation::Where where = cuda_emulation::Where::current()) {
  cuda_emulation::barrier(where);
}

template <class T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32,
                   cuda_emulation::Where where = cuda_emulation::Where::current()) {
  const int source = cuda_emulation::lane() + static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, source, width, "__shfl_down_sync", where);
}

// Threads change places only where they wait for each other, so what lies between is indivisible and in order.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old + value;
  return old;
}

inline void __threadfence() {}

template <class T>
T __ldcg(const T* p) {
  return *p;
}

#undef assert
#define assert(condition) \
  ((condition) ? static_cast<void>(0) : cuda_emulation::fail("assertion " #condition, cuda_emulation::Where::current()))
