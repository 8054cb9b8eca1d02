// The figures of a step and their sums: shared by the CPU and the CUDA kernels.
#pragma once

#include "common.h"

namespace bvae {

struct StepFigures {
  const bool* good;
  int part_count;
  const float* parts;    // [part_count]
  const float* moments;  // [moment_count]
  int64_t moment_count;
  double *sum_parts, *sum_moments;
  double* counts;   // steps that were good, steps that were not
  double* trouble;  // scalar
};

// Adds all but the moments. What is not good is counted and adds nothing.
BVAE_HD void add_figures(const StepFigures& f) {
  const bool good = *f.good;
  if (good) {
    for (int i = 0; i < f.part_count; ++i) f.sum_parts[i] += f.parts[i];
  }
  f.counts[good ? 0 : 1] += 1.0;
  // Grows without end only where more than one step in five is bad.
  const double next = *f.trouble + (good ? -0.25 : 1.0);
  *f.trouble = next < 0.0 ? 0.0 : next;
}

}  // namespace bvae
