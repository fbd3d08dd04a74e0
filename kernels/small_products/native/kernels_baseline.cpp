// The kernels for any CPU of this architecture.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#define TWP_KERNELS twp_kernels_baseline
#include "kernels.inc"
