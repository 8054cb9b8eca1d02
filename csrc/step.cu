// Copies of many tensors in one launch, and the end of a step: its figures added to their sums, or its state put back.
#include "device.cuh"

namespace bvae {
namespace {

constexpr int kCopies = 120;  // pairs a launch takes by value

struct CopyTable {
  int count;
  Copy copies[kCopies];
};

__device__ __forceinline__ void copy_tensors(const CopyTable& table) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int t = 0; t < table.count; ++t) {
    const Copy c = table.copies[t];
    const bool words = c.bytes % 4 == 0 && aligned<float, 1>(c.to) && aligned<float, 1>(c.from);
    if (words) {
      for (int64_t i = thread; i < c.bytes / 4; i += threads) {
        static_cast<uint32_t*>(c.to)[i] = static_cast<const uint32_t*>(c.from)[i];
      }
    } else {
      for (int64_t i = thread; i < c.bytes; i += threads) {
        static_cast<uint8_t*>(c.to)[i] = static_cast<const uint8_t*>(c.from)[i];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResident) copy_kernel(CopyTable table) { copy_tensors(table); }

__global__ void __launch_bounds__(kThreads, kResident) end_step_kernel(StepFigures figures, CopyTable undo) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread == 0) add_figures(figures);
  if (!*figures.good) {
    copy_tensors(undo);
    return;
  }
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < figures.moment_count; i += threads) figures.sum_moments[i] += figures.moments[i];
}

__global__ void __launch_bounds__(kThreads, kResident) undo_kernel(const bool* good, CopyTable undo) {
  if (!*good) copy_tensors(undo);
}

// Calls launch_table(table, threads that have something to do) for all copies, and at least once.
template <class F>
int by_copies(const Copy* copies, int64_t count, const F& launch_table) {
  int64_t begin = 0;
  do {
    CopyTable table{};
    int64_t most = 1;
    for (; table.count < kCopies && begin < count; ++begin) {
      table.copies[table.count++] = copies[begin];
      const int64_t items = (copies[begin].bytes + 3) / 4;
      most = items > most ? items : most;
    }
    launch_table(table, most);
    BVAE_CUDA_TRY(cudaGetLastError());
  } while (begin < count);
  return 0;
}

}  // namespace

int cuda_copy_all(const Copy* copies, int64_t count, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  if (count == 0) return 0;
  return by_copies(copies, count, [&](const CopyTable& table, int64_t items) {
    copy_kernel<<<one_wave(items, launch), kThreads, 0, stream>>>(table);
  });
}

int cuda_end_step(const StepFigures& figures, const Copy* undo, int64_t count, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  bool first = true;
  return by_copies(undo, count, [&](const CopyTable& table, int64_t items) {
    if (first) {
      items = figures.moment_count > items ? figures.moment_count : items;
      end_step_kernel<<<one_wave(items, launch), kThreads, 0, stream>>>(figures, table);
    } else {
      undo_kernel<<<one_wave(items, launch), kThreads, 0, stream>>>(figures.good, table);
    }
    first = false;
  });
}

}  // namespace bvae
