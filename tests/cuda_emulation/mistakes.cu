// Kernels with mistakes that the emulation must report, and one without: `mistakes NAME` runs the one of that name.
#include <cuda_runtime.h>

#include <memory>
#include <string>

constexpr int kThreads = 64;

// Sums 0 .. 63 over two warps, and over the blocks in the last one; every part of it done right.
__global__ void right(unsigned int* ticket, int* partials, int* out, int extra) {
  __shared__ int warps[kThreads / 32];
  __shared__ bool last;
  extern __shared__ int scale[];
  if (threadIdx.x == 0) *scale = 1 + extra;
  __syncthreads();
  int value = static_cast<int>(threadIdx.x) * *scale;
  for (int step = 16; step > 0; step >>= 1) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = warps[0] + warps[1];
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) {
      *out = 0;
      for (unsigned int b = 0; b < gridDim.x; ++b) *out += __ldcg(&partials[b]);
    }
  }
}

__global__ void divergent_barrier() {
  if (threadIdx.x != 40) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x % 32 != 7) *out = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void shuffle_at_a_barrier(int* out) {
  if (threadIdx.x < 16) *out = __shfl_down_sync(0xffffffffu, 1, 1);
  __syncthreads();
}

__global__ void shuffle_from_outside(int* out) {
  if (threadIdx.x < 16) *out = __shfl_down_sync(0x0000ffffu, 1, 1);
}

__global__ void outside_of_memory(int* out) { out[threadIdx.x] = 1; }

__global__ void outside_of_shared_memory(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 1;
  __syncthreads();
  *out = values[threadIdx.x + 1];
}

__global__ void misaligned(int* out) { reinterpret_cast<uint2*>(out + 1)->x = 1; }

__global__ void false_assertion() { assert(threadIdx.x < 63); }

int main(int, char** arguments) {
  const std::string name = arguments[1];
  const std::unique_ptr<int[]> out(new int[kThreads - 1]), partials(new int[100]);
  if (name == "right") {
    unsigned int ticket = 0;
    right<<<100, kThreads, sizeof(int), nullptr>>>(&ticket, partials.get(), out.get(), 1);
    if (ticket != 100 || out[0] != 100 * 2 * 63 * 32) return 1;
    right<<<0, kThreads, 0, nullptr>>>(&ticket, partials.get(), out.get(), 1);
    return cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess ? 0 : 1;
  }
  if (name == "divergent_barrier") divergent_barrier<<<1, kThreads>>>();
  if (name == "two_barriers") two_barriers<<<1, kThreads>>>();
  if (name == "divergent_shuffle") divergent_shuffle<<<1, kThreads>>>(out.get());
  if (name == "shuffle_at_a_barrier") shuffle_at_a_barrier<<<1, kThreads>>>(out.get());
  if (name == "shuffle_from_outside") shuffle_from_outside<<<1, kThreads>>>(out.get());
  if (name == "outside_of_memory") outside_of_memory<<<1, kThreads>>>(out.get());
  if (name == "outside_of_shared_memory") outside_of_shared_memory<<<1, kThreads>>>(out.get());
  if (name == "misaligned") misaligned<<<1, kThreads>>>(out.get());
  if (name == "false_assertion") false_assertion<<<1, kThreads>>>();
  return 0;
}
