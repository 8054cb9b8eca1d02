// The loops for AVX2. GCC's pragma sets the target for what follows it, so the standard headers come first: their
// inline functions must stay runnable everywhere. Other compilers leave this file empty and use the baseline.
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define BVAE_FMA 1
#define BVAE_CPU_NAME "avx2"
#include "cpu_loops.h"

namespace bvae {
BVAE_CPU_LOOPS(cpu_loops_avx2);
}
#endif
