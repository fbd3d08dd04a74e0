// The kernels for any CPU of this architecture.
#define TW_KERNELS tw_kernels_baseline
#include "kernels.inc"
