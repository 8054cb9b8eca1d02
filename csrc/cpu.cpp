// Which of the compiled loops runs: the widest that the processor has, or BVAE_CPU_CAPABILITY's where that is less.
#include "cpu.h"

#include <cstdlib>
#include <string_view>

namespace bvae {

extern const CpuLoops cpu_loops_baseline;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BVAE_X86_LOOPS 1
extern const CpuLoops cpu_loops_avx2;
extern const CpuLoops cpu_loops_avx512;
#endif

static const CpuLoops& choose() {
#ifdef BVAE_X86_LOOPS
  const char* wish = std::getenv("BVAE_CPU_CAPABILITY");
  const std::string_view most = wish == nullptr ? "avx512" : wish;
  if (most == "baseline") return cpu_loops_baseline;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && most != "avx2") return cpu_loops_avx512;
  if (avx2) return cpu_loops_avx2;
#endif
  return cpu_loops_baseline;
}

const CpuLoops& cpu_loops() {
  static const CpuLoops& chosen = choose();
  return chosen;
}

}  // namespace bvae
