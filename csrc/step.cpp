// What begins and ends an optimiser step: a copy of the state that it moves, sums of its figures, the state put back.
#include "ops.h"

#include <cstring>

namespace bvae {
namespace {

// Pairs of dense tensors that are alike, as memory to copy.
std::vector<Copy> copies(const std::vector<Tensor>& to, const std::vector<Tensor>& from, const Tensor& on) {
  STD_TORCH_CHECK(to.size() == from.size(), "bvae: copies need two lists of one length");
  std::vector<Copy> all;
  for (size_t i = 0; i < to.size(); ++i) {
    check_same_device(on, to[i], "the first tensor", "a copy");
    check_same_device(on, from[i], "the first tensor", "a tensor to copy");
    STD_TORCH_CHECK(same_sizes(to[i], from[i]) && same_strides(to[i], from[i]) && is_dense(to[i]) &&
                        to[i].scalar_type() == from[i].scalar_type(),
                    "bvae: a copy must be like its tensor, and dense");
    const int64_t bytes = to[i].numel() * static_cast<int64_t>(to[i].element_size());
    if (bytes > 0) all.push_back({to[i].mutable_data_ptr(), from[i].const_data_ptr(), bytes});
  }
  return all;
}

double* sums_of(Tensor t, const Tensor& good, int64_t count, const char* name) {
  check_same_device(good, t, "good", name);
  STD_TORCH_CHECK(t.numel() == count && t.scalar_type() == ScalarType::Double && t.is_contiguous(), "bvae: ", name,
                  " must be float64, ", count, " in a row");
  return static_cast<double*>(t.mutable_data_ptr());
}

}  // namespace

void copy_all(const std::vector<Tensor>& to, const std::vector<Tensor>& from) {
  if (to.empty() && from.empty()) return;
  STD_TORCH_CHECK(!to.empty(), "bvae: copies need two lists of one length");
  const std::vector<Copy> all = copies(to, from, to[0]);
  if (runs_on_cpu(to[0])) {
    for (const Copy& c : all) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
  } else {
    on_cuda(to[0], [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_copy_all(all.data(), static_cast<int64_t>(all.size()), launch);
#endif
    });
  }
}

void end_step(const Tensor& good, const Tensor& parts, const std::optional<Tensor>& moments,
              Tensor sum_parts, Tensor sum_moments, Tensor counts, Tensor trouble, const std::vector<Tensor>& state,
              const std::vector<Tensor>& kept) {
  check_scalar(good, ScalarType::Bool, "good");
  StepFigures f{};
  f.good = static_cast<const bool*>(good.const_data_ptr());
  check_same_device(good, parts, "good", "parts");
  STD_TORCH_CHECK(parts.scalar_type() == ScalarType::Float && parts.is_contiguous() && parts.dim() == 1,
                  "bvae: parts must be float32, in a row");
  f.parts = static_cast<const float*>(parts.const_data_ptr());
  f.part_count = static_cast<int>(parts.numel());
  f.sum_parts = sums_of(sum_parts, good, f.part_count, "sum_parts");
  f.counts = sums_of(counts, good, 2, "counts");
  f.trouble = sums_of(trouble, good, 1, "trouble");
  if (moments.has_value()) {
    check_same_device(good, *moments, "good", "moments");
    STD_TORCH_CHECK(moments->scalar_type() == ScalarType::Float && moments->is_contiguous(),
                    "bvae: moments must be float32 and contiguous");
    f.moments = static_cast<const float*>(moments->const_data_ptr());
    f.moment_count = moments->numel();
    f.sum_moments = sums_of(sum_moments, good, f.moment_count, "sum_moments");
  }
  const std::vector<Copy> undo = copies(state, kept, good);
  if (runs_on_cpu(good)) {
    add_figures(f);
    if (*f.good) {
      for (int64_t i = 0; i < f.moment_count; ++i) f.sum_moments[i] += f.moments[i];
    } else {
      for (const Copy& c : undo) std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
  } else {
    on_cuda(good, [&]([[maybe_unused]] Launch launch) {
#ifdef BVAE_WITH_CUDA
      return cuda_end_step(f, undo.data(), static_cast<int64_t>(undo.size()), launch);
#endif
    });
  }
}

}  // namespace bvae
