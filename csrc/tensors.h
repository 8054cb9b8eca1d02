// Small helpers over LibTorch's stable ABI: types, layouts, allocation, the current CUDA stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "arithmetic.h"
#include "cpu.h"
#include "cuda.h"

#ifdef BVAE_WITH_CUDA
// Weak: a CPU-only torch does not have it, and the extension must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace bvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name, bool allow_u8 = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Byte:
      if (allow_u8) return DType::u8;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, "bvae: ", name, " must be float32, float64, bfloat16 or float16",
                      allow_u8 ? " or uint8" : "", ", got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// Sums are kept and returned in float32, for float64 inputs in float64.
inline ScalarType sum_type(DType t) { return t == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline int32_t type_code(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    default:
      STD_TORCH_CHECK(false, "bvae: no type code for ", torch::headeronly::toString(t));
  }
}

// Asks for large pages under a large new block of the CPU's memory. From 32 MiB on glibc maps every block afresh, and
// the faults of its 4 KiB pages, at the first write, cost more than our loops.
inline void use_large_pages([[maybe_unused]] const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096, least = uintptr_t{1} << 25;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * static_cast<uintptr_t>(t.element_size());
  if (bytes < least) return;
  const uintptr_t first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);  // a hint: failing is no error
#endif
}

// An uninitialised tensor on like's device. The C shim, not the dispatcher: one call instead of a boxed one.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType type) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type_code(type), device_type,
                                                  like.get_device_index(), &handle));
  Tensor made(handle);
  if (device_type == aoti_torch_device_type_cpu()) use_large_pages(made);
  return made;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(like, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), type);
}

inline Tensor empty_scalar(const Tensor& like, ScalarType type) { return empty_strided(like, nullptr, nullptr, 0, type); }

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// True if two tensors of the same shape visit memory in the same order. A dimension of size 1 has no order.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && x[i] != y[i]) return false;
  }
  return true;
}

// True if the elements fill one block of memory without gaps or overlap, in any order of the dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::array<int64_t, 2>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1) dims.push_back({strides[i], sizes[i]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline void check_same_device(const Tensor& a, const Tensor& b, const char* first, const char* second) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
                      a.get_device_index() == b.get_device_index(),
                  "bvae: ", first, " and ", second, " are on different devices");
}

inline void check_scalar(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == type, "bvae: ", name, " must be one ",
                  torch::headeronly::toString(type), " element, got ", t.numel(), " of ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline double scalar_value(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : static_cast<double>(*static_cast<const float*>(t.const_data_ptr()));
}

inline void set_scalar(const Tensor& t, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(t.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(value);
  }
}

inline const void* optional_data(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// True if the CPU loops take t. benchmarks/emulate_cuda.py builds the extension so that CUDA kernels do, on the CPU.
inline bool runs_on_cpu([[maybe_unused]] const Tensor& t) {
#ifdef BVAE_EMULATE_CUDA
  return false;
#else
  return t.is_cpu();
#endif
}

// Runs launch(Launch) on the device and current stream of `on`.
template <class F>
void on_cuda(const Tensor& on, [[maybe_unused]] const F& launch) {
#ifdef BVAE_WITH_CUDA
#ifdef BVAE_EMULATE_CUDA
  Launch on_stream{0, 0, nullptr};
#else
  const int32_t device = on.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "bvae: a CUDA tensor reached the extension, but this PyTorch was built without CUDA");
  Launch on_stream{device, 0, nullptr};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &on_stream.stream));
#endif
  int error = cuda_multiprocessors(on_stream.device, &on_stream.multiprocessors);
  if (error == 0) error = launch(on_stream);
  STD_TORCH_CHECK(error == 0, "bvae: CUDA launch failed: ", cuda_error_string(error));
#else
  STD_TORCH_CHECK(on.is_cpu(),
                  "bvae: this build has no CUDA kernels. Rebuild where nvcc is: set CUDA_HOME to the CUDA toolkit and "
                  "run `pip install --no-build-isolation .` (python -m bvae.info shows what was built)");
#endif
}

}  // namespace bvae
