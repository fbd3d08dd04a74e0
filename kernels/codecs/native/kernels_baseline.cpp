// The kernels for any CPU of this architecture.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#define TW_KERNELS twc_kernels_baseline
#include "kernels.inc"
