// Adam on CUDA over many tensors a launch, and the check of their gradients. A launch takes its table of tensors by
// value: nothing is copied to the device first, and a CUDA graph keeps the table itself. Tensors are cut into chunks,
// which the blocks take in turn.
#include "device.cuh"

namespace bvae {
namespace {

constexpr size_t kMostBytes = 4096;  // limit for a kernel's parameters, in every driver

// Chunk c of a launch is chunk c - first[t] of tensor t, where first[t] <= c < first[t + 1].
template <int most>
struct Chunks {
  int count;
  int first[most + 1];
  int64_t numel[most];
};

// The part of a tensor that a block works on.
struct Piece {
  int64_t begin;
  int n;
};

template <int chunk, class Table>
__device__ __forceinline__ Piece piece_of(const Table& table, int t, int c) {
  const int64_t begin = static_cast<int64_t>(c - table.chunks.first[t]) * chunk;
  const int64_t rest = table.chunks.numel[t] - begin;
  return {begin, static_cast<int>(rest < chunk ? rest : chunk)};
}

// Splits `count` tensors into tables and launches each: put(table, place, i) writes tensor i, of numel(i) elements, to
// its place in the table, launch_table(table, first tensor, chunks) launches it.
template <class Table, int most, int chunk, class Numel, class Put, class LaunchTable>
int by_tables(int64_t count, const Numel& numel, const Put& put, const LaunchTable& launch_table) {
  static_assert(sizeof(Table) <= kMostBytes - 64);  // the rest is for the kernel's other parameters
  for (int64_t begin = 0; begin < count; begin += most) {
    Table table{};
    const int tensors = static_cast<int>(count - begin < most ? count - begin : most);
    table.chunks.count = tensors;
    for (int i = 0; i < tensors; ++i) {
      const int64_t n = numel(begin + i);
      const int64_t chunks = table.chunks.first[i] + (n + chunk - 1) / chunk;
      if (chunks > INT32_MAX / 2) return static_cast<int>(cudaErrorInvalidValue);
      table.chunks.first[i + 1] = static_cast<int>(chunks);
      table.chunks.numel[i] = n;
      put(&table, i, begin + i);
    }
    const int chunks = table.chunks.first[tensors];
    if (chunks == 0) continue;
    launch_table(table, begin, chunks);
    BVAE_CUDA_TRY(cudaGetLastError());
  }
  return 0;
}

// ---- the check -----------------------------------------------------------------------------------------------------

constexpr int kFiniteTensors = 160, kFiniteChunk = 4096;

struct FiniteTable {
  Chunks<kFiniteTensors> chunks;
  const void* data[kFiniteTensors];
  DType type[kFiniteTensors];
};

template <class T>
__device__ __forceinline__ int32_t largest_magnitude(const void* data, Piece piece) {
  constexpr int n = kVector<T>, ahead = kFiniteChunk / (kThreads * n);
  const T* from = static_cast<const T*>(data) + piece.begin;
  // A chunk begins at a multiple of 16 bytes where its tensor does.
  const int vectors = aligned<T, n>(data) ? piece.n / n : 0;
  Pack<T, n> packs[ahead] = {};
#pragma unroll
  for (int v = 0; v < ahead; ++v) {
    const int i = v * kThreads + threadIdx.x;
    if (i < vectors) packs[v] = load_pack<T, n>(from, i);
  }
  int32_t largest = 0;
#pragma unroll
  for (int v = 0; v < ahead; ++v) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int32_t next = magnitude(Element<T>::get(packs[v].v[j]));
      largest = next > largest ? next : largest;
    }
  }
#pragma unroll 1
  for (int i = vectors * n + threadIdx.x; i < piece.n; i += kThreads) {
    const int32_t next = magnitude(Element<T>::get(from[i]));
    largest = next > largest ? next : largest;
  }
  return largest;
}

// `finite` holds true. Who writes, writes false: the order does not matter.
__global__ void __launch_bounds__(kThreads, kResident) finite_kernel(FiniteTable table, bool* finite) {
  int32_t largest = 0;
  int t = 0;
  for (int c = blockIdx.x; c < table.chunks.first[table.chunks.count]; c += gridDim.x) {
    while (c >= table.chunks.first[t + 1]) ++t;
    const Piece piece = piece_of<kFiniteChunk>(table, t, c);
    int32_t next = 0;
    switch (table.type[t]) {
      case DType::bf16:
        next = largest_magnitude<__nv_bfloat16>(table.data[t], piece);
        break;
      case DType::f16:
        next = largest_magnitude<__half>(table.data[t], piece);
        break;
      default:
        next = largest_magnitude<float>(table.data[t], piece);
    }
    largest = next > largest ? next : largest;
  }
  if (largest >= kTooLarge) *finite = false;
}

// ---- Adam ----------------------------------------------------------------------------------------------------------

constexpr int kSlots = 960, kAdamTensors = 70;
constexpr int kPack = 4;  // elements a thread takes of a chunk: 16 bytes of float in three loads, and the gradient's
constexpr int kAdamChunk = kThreads * kPack;

struct Slots {
  int count;
  int slot[kSlots];
};

// Moves the step counts, and makes what follows from them, once a tensor instead of once a block.
__global__ void __launch_bounds__(kThreads)
    corrections_kernel(Slots slots, float* steps, const bool* good, const float* lr, double beta1, double beta2,
                       AdamCorrections* corrections) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= slots.count || !*good) return;
  const float step = steps[slots.slot[i]] + 1.0f;
  steps[slots.slot[i]] = step;
  corrections[i] = adam_corrections(*lr, beta1, beta2, step);
}

struct AdamTable {
  Chunks<kAdamTensors> chunks;
  const void* grad[kAdamTensors];
  float *parameter[kAdamTensors], *exp_avg[kAdamTensors], *exp_avg_sq[kAdamTensors];
  uint16_t* half[kAdamTensors];
  DType type[kAdamTensors];
};

template <class G>
__device__ __forceinline__ void adam_chunk(const AdamTable& table, int t, Piece piece, const AdamFactors& factors,
                                           const AdamCorrections& corrections) {
  const G* grad = static_cast<const G*>(table.grad[t]);
  float *parameter = table.parameter[t], *exp_avg = table.exp_avg[t], *exp_avg_sq = table.exp_avg_sq[t];
  __nv_bfloat16* half = reinterpret_cast<__nv_bfloat16*>(table.half[t]);
  const bool whole = aligned<G, kPack>(grad) && aligned<float, kPack>(parameter) && aligned<float, kPack>(exp_avg) &&
                     aligned<float, kPack>(exp_avg_sq) && aligned<__nv_bfloat16, kPack>(half);
  grad += piece.begin;
  parameter += piece.begin;
  exp_avg += piece.begin;
  exp_avg_sq += piece.begin;
  if (half != nullptr) half += piece.begin;
  const int vectors = whole ? piece.n / kPack : 0, at = threadIdx.x;
  if (at < vectors) {
    const Pack<G, kPack> g = load_pack<G, kPack>(grad, at);
    Pack<float, kPack> p = load_pack<float, kPack>(parameter, at);
    Pack<float, kPack> m = load_pack<float, kPack>(exp_avg, at);
    Pack<float, kPack> v = load_pack<float, kPack>(exp_avg_sq, at);
    Pack<__nv_bfloat16, kPack> h;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      adam_element(factors, corrections, Element<G>::get(g.v[j]), &p.v[j], &m.v[j], &v.v[j]);
      h.v[j] = Element<__nv_bfloat16>::put(p.v[j]);
    }
    store_pack<float, kPack>(parameter, p, at);
    store_pack<float, kPack>(exp_avg, m, at);
    store_pack<float, kPack>(exp_avg_sq, v, at);
    if (half != nullptr) store_pack<__nv_bfloat16, kPack>(half, h, at);
  }
#pragma unroll 1
  for (int i = vectors * kPack + threadIdx.x; i < piece.n; i += kThreads) {
    adam_element(factors, corrections, Element<G>::get(grad[i]), &parameter[i], &exp_avg[i], &exp_avg_sq[i]);
    if (half != nullptr) half[i] = Element<__nv_bfloat16>::put(parameter[i]);
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    adam_kernel(AdamTable table, const bool* good, const AdamCorrections* corrections, AdamFactors factors) {
  if (!*good) return;
  int t = 0;
  for (int c = blockIdx.x; c < table.chunks.first[table.chunks.count]; c += gridDim.x) {
    while (c >= table.chunks.first[t + 1]) ++t;
    const Piece piece = piece_of<kAdamChunk>(table, t, c);
    const AdamCorrections now = corrections[t];
    switch (table.type[t]) {
      case DType::bf16:
        adam_chunk<__nv_bfloat16>(table, t, piece, factors, now);
        break;
      case DType::f16:
        adam_chunk<__half>(table, t, piece, factors, now);
        break;
      default:
        adam_chunk<float>(table, t, piece, factors, now);
    }
  }
}

}  // namespace

int cuda_all_finite(const Elements* tensors, int64_t count, bool* finite, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  BVAE_CUDA_TRY(cudaMemsetAsync(finite, true, sizeof(bool), stream));
  return by_tables<FiniteTable, kFiniteTensors, kFiniteChunk>(
      count, [&](int64_t i) { return tensors[i].numel; },
      [&](FiniteTable* table, int place, int64_t i) {
        table->data[place] = tensors[i].data;
        table->type[place] = tensors[i].type;
      },
      [&](const FiniteTable& table, int64_t, int chunks) {
        const unsigned int blocks = one_wave(static_cast<int64_t>(chunks) * kThreads, launch);
        finite_kernel<<<blocks, kThreads, 0, stream>>>(table, finite);
      });
}

int cuda_adam(const AdamArgs& args, Launch launch) {
  BVAE_CUDA_TRY(cudaSetDevice(launch.device));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  for (int64_t begin = 0; begin < args.count; begin += kSlots) {
    Slots slots{};
    slots.count = static_cast<int>(args.count - begin < kSlots ? args.count - begin : kSlots);
    for (int i = 0; i < slots.count; ++i) slots.slot[i] = args.tensors[begin + i].slot;
    corrections_kernel<<<(slots.count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        slots, args.steps, args.good, args.lr, args.beta1, args.beta2, args.corrections + begin);
    BVAE_CUDA_TRY(cudaGetLastError());
  }
  return by_tables<AdamTable, kAdamTensors, kAdamChunk>(
      args.count, [&](int64_t i) { return args.tensors[i].numel; },
      [&](AdamTable* table, int place, int64_t i) {
        const AdamTensor& t = args.tensors[i];
        table->grad[place] = t.grad;
        table->parameter[place] = t.parameter;
        table->exp_avg[place] = t.exp_avg;
        table->exp_avg_sq[place] = t.exp_avg_sq;
        table->half[place] = t.half;
        table->type[place] = t.type;
      },
      [&](const AdamTable& table, int64_t first, int chunks) {
        const unsigned int blocks = one_wave(static_cast<int64_t>(chunks) * kThreads, launch);
        adam_kernel<<<blocks, kThreads, 0, stream>>>(table, args.good, args.corrections + first, args.factors);
      });
}

}  // namespace bvae
