// The kernels for AVX-512 (F, BW, VL, DQ); see tables.inc and kernels.inc.

#include "tables.inc"

#if DS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
namespace deltaserve::avx512 {
#define DS_ISA 2
#include "kernels.inc"
}  // namespace deltaserve::avx512
#pragma GCC pop_options
#endif
