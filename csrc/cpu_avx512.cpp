// The loops for AVX512. GCC's pragma sets the target for what follows it, so the standard headers come first: their
// inline functions must stay runnable everywhere. Other compilers leave this file empty and use the baseline.
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define BVAE_FMA 1
#define BVAE_CPU_NAME "avx512"
#include "cpu_loops.h"

namespace bvae {
BVAE_CPU_LOOPS(cpu_loops_avx512);
}
#endif
