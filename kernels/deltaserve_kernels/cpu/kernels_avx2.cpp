// The kernels for AVX2, FMA and F16C; see tables.inc and kernels.inc.

#include "tables.inc"

#if DS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace deltaserve::avx2 {
#define DS_ISA 1
#include "kernels.inc"
}  // namespace deltaserve::avx2
#pragma GCC pop_options
#endif
