// The loops for the compiler's own baseline: SSE2 on x86-64, NEON on aarch64.
#include "cpu.h"
#define BVAE_CPU_NAME "baseline"
#include "cpu_loops.h"

namespace bvae {
BVAE_CPU_LOOPS(cpu_loops_baseline);
}
