// The kernels for AVX-512 with BF16 dot products; see tables.inc and kernels.inc.

#include "tables.inc"

#if DS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace deltaserve::avx512_bf16 {
#define DS_ISA 3
#include "kernels.inc"
}  // namespace deltaserve::avx512_bf16
#pragma GCC pop_options
#endif
