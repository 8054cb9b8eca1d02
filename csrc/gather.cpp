// One batch out of a resident uint8 array: checks, allocation, the CPU's threads.
#include "ops.h"

namespace bvae {

std::tuple<Tensor, Tensor> gather(const Tensor& data, const Tensor& index, const std::optional<Tensor>& flip,
                                  ScalarType dtype) {
  STD_TORCH_CHECK(data.dim() == 4 && data.scalar_type() == ScalarType::Byte && data.is_contiguous(),
                  "bvae: data must be a contiguous uint8 array [N, H, W, C]");
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long, "bvae: index must be int64 [B]");
  check_same_device(data, index, "data", "index");
  const int64_t n = data.size(0), h = data.size(1), w = data.size(2), c = data.size(3), b = index.size(0);
  STD_TORCH_CHECK(h * w * c <= INT32_MAX, "bvae: an image may have at most 2^31 - 1 elements");
  if (flip.has_value()) {
    STD_TORCH_CHECK(flip->dim() == 1 && flip->size(0) == b && flip->scalar_type() == ScalarType::Bool,
                    "bvae: flip must be bool [B]");
    check_same_device(data, *flip, "data", "flip");
  }
  const Tensor order = as_contiguous(index);
  std::optional<Tensor> mirror;
  if (flip.has_value()) mirror = as_contiguous(*flip);

  const int64_t sizes[4] = {b, c, h, w};
  // NHWC memory. An empty dimension counts as one, as torch's own strides do.
  const auto one = [](int64_t s) { return std::max<int64_t>(s, 1); };
  const int64_t strides[4] = {one(h) * one(w) * one(c), 1, one(w) * one(c), one(c)};
  Tensor x = empty_strided(data, sizes, strides, 4, dtype);
  Tensor rows = empty_strided(data, sizes, strides, 4, ScalarType::Byte);
  const DType type = dtype_of(x, "dtype");
  const uint8_t* from = static_cast<const uint8_t*>(data.const_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(order.const_data_ptr());
  const bool* mirrored = static_cast<const bool*>(optional_data(mirror));
  void* x_data = x.mutable_data_ptr();
  uint8_t* rows_data = static_cast<uint8_t*>(rows.mutable_data_ptr());

  if (runs_on_cpu(data)) {
    for (int64_t i = 0; i < b; ++i) {
      STD_TORCH_CHECK(at[i] >= 0 && at[i] < n, "bvae: index ", at[i], " is out of range for ", n, " images");
    }
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, h * w * c));
    torch::stable::parallel_for(0, b, grain, [&](int64_t begin, int64_t end) {
      cpu_loops().gather(from, at, mirrored, type, x_data, rows_data, h, w, c, begin, end);
    });
  } else {
    on_cuda(data, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_gather({from, at, mirrored, type, x_data, rows_data, n, b, h, w, c}, launch);
#endif
    });
  }
  return {x, rows};
}

}  // namespace bvae
