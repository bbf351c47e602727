// Multi-adapter operators for CPUs: argument checks, work split, and the kernels of each instruction set.
//
// One translation unit, built by build.py with a direct compiler call. kernels.inc is compiled once per instruction
// set; the best one the machine has is chosen when the library is loaded. PyTorch releases the GIL around these calls.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define DS_X86 1
#else
#define DS_X86 0
#endif

#define DS_INLINE inline __attribute__((always_inline))

namespace {

#include "elements.inc"
#include "given.inc"

template <class T>
struct Kernels {
  void (*shrink)(const T* const*, int64_t, const T*, int64_t, int64_t, float*, int64_t, const T*);
  void (*expand)(T* const*, int64_t, const ExpandPart<T>*, int, int64_t, int64_t, int64_t, const float*, int64_t);
  void (*sparse_stage)(const T* const*, int64_t, int64_t, float*);
  void (*sparse_row)(const float*, T*, const SparsePart<T>*, int, int64_t, float*, Ahead);
  void (*sparse_rows)(const float*, T* const*, int64_t, const SparsePart<T>*, int, int64_t, Ahead);
  void (*attend)(const AttendTask<T>&);
  void (*rms_norm_row)(T*, const T*, const T*, int64_t, float, float, const Change*, int64_t, const float*);
  void (*gated_row)(T*, const T*, const T*, int64_t, int);
  void (*rotate_head)(T*, const T*, const T*, const T*, int64_t, int64_t);
  void (*widen)(const T*, float*, int64_t);
  void (*gemm_group)(const float*, int64_t, int64_t, const T*, int, float*, float*, Ahead*);
  void (*add_uses)(const Use<T>*, int64_t, float*, int64_t, int64_t, int);
  void (*gemm_finish)(T*, int64_t, int64_t, const float*, int64_t, int64_t, const T*);
  void (*change_sums)(const Change*, int64_t, float*, int64_t, int64_t, int, const T*);
  void (*finish_changed)(T*, int64_t, int64_t, const float*, const Change*, int64_t, int64_t, int64_t, int, const T*);
  void (*widen_changed)(const T*, float*, int64_t, const Change*, int64_t, const float*);
  void (*sign_tables)(const float*, int64_t, float*);
  void (*sign_sums)(const float*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, float*, uint32_t*);
  void (*matrix_sums)(const float*, int64_t, int64_t, const T*, int64_t, int64_t, float*, int64_t);
  void (*stage_row)(const T*, float*, int64_t);
  void (*shrink_wide)(const float*, int64_t, int64_t, const T*, int64_t, int64_t, float*, int64_t);
  void (*expand_wide)(float*, int64_t, int64_t, const T*, int64_t, int64_t, const float*, int64_t, const float*, float);
  void (*activate_row)(float*, const float*, int64_t, int);
  void (*narrow)(const float*, T*, int64_t);
  void (*rotate_part)(float*, const float*, int64_t, int64_t, const RotationPart&, float*, bool);
  void (*add_row)(T*, const float*, int64_t);
  void (*add_rounded)(float*, const float*, int64_t);
  void (*masked_sums)(const float*, int64_t, int64_t, const T*, const uint32_t*, int64_t, int64_t, int64_t, float*, int64_t);
  void (*masked_panels)(const float*, int64_t, int64_t, const T*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, float*,
                        uint32_t*, float*);
};

// Blocking of gemm.inc: k of one widened block of a panel (16 KiB, half of a level 1 cache), and the rows whose fp32
// copies stay in half of a level 2 cache.
constexpr int64_t kGemmDepth = 256;
constexpr int kGroupPanels = 4;  // panels whose sums are held together: 64 outputs, two cache lines of an adapter's row
constexpr int64_t kSignBlock = 32;  // outputs whose signs are looked up at once, apart.inc's
constexpr int64_t kMaskLanes = 48;  // of the panels that so many outputs lie in, mask.inc's
constexpr int64_t gemm_block_rows(int64_t k_size) {
  const int64_t rows = 64 * 1024 / k_size / 12 * 12;
  return rows < 48 ? 48 : rows > 192 ? 192 : rows;
}

namespace portable {
#define DS_ISA 0
#include "vec.inc"
#include "kernels.inc"
#undef DS_ISA
}  // namespace portable

#if DS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define DS_ISA 1
#include "vec.inc"
#include "kernels.inc"
#undef DS_ISA
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {
#define DS_ISA 2
#include "vec.inc"
#include "kernels.inc"
#undef DS_ISA
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace avx512_bf16 {
#define DS_ISA 3
#include "vec.inc"
#include "kernels.inc"
#undef DS_ISA
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

#include "levels.inc"
#include "tasks.inc"
#include "work.inc"
#include "linear.inc"
#include "changes_ops.inc"
#include "paged_attention.inc"
#include "pointwise_ops.inc"
#include "rotation_ops.inc"
#include "packed_inputs.inc"
#include "packed_linear.inc"
#include "vector_ops.inc"
#include "packed_terms.inc"
#include "block_ops.inc"
#include "apart_ops.inc"
#include "vocabulary_ops.inc"

}  // namespace

TORCH_LIBRARY(deltaserve_cpu, m) {
  m.def(
      "prepare_work(Tensor rows, Tensor item_rows, Tensor item_parts, Tensor part_slot, Tensor part_scale, "
      "int num_rows) -> Tensor");
  m.def("prepare_changes(Tensor work, Tensor pointers, Tensor dims) -> Tensor");
  m.def(
      "lora_linear(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor ranks, Tensor dims, int[] members, float depth) -> ()");
  m.def(
      "sparse_linear(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor extents, Tensor dims, int[] members, float depth) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor kv_lens, float scale, int window, float softcap, Tensor? sinks) -> Tensor");
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_index) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
  m.def(
      "rms_norm_changed(Tensor x, Tensor weight, float eps, float offset, Tensor changes, int norm, float depth) -> "
      "Tensor");
  m.def("gated_product(Tensor both, int activation) -> Tensor");
  m.def(
      "rotate_and_store(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "Tensor kv_index) -> ()");
  m.def(
      "scale_shift(Tensor(a!) y, Tensor work, Tensor pointers, Tensor dims, int[] members, Tensor? gain, Tensor? shift, "
      "float unit, float depth) -> ()");
  m.def(
      "rotate_blocks(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor dims, int[] members, float depth) -> ()");
  m.def(
      "block_linear(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor sizes, Tensor dims, int[] members, float depth) -> ()");
  m.def(
      "dense_linear(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor dims, int[] members, float depth, "
      "Tensor? weight) -> ()");
  m.def(
      "add_modules(Tensor(a!) y, Tensor work, Tensor pointers, Tensor sizes, Tensor dims, int point, float depth, "
      "Tensor[] taps, int[] tap_points) -> ()");
  m.def("change_rows(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor counts, Tensor dims) -> ()");
  m.def(
      "changed_embeddings(Tensor ids, Tensor weight, Tensor work, Tensor low_rank, Tensor ranks, Tensor pointers, "
      "Tensor counts, Tensor dims) -> (Tensor, Tensor)");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int outputs) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, int outputs, Tensor? bias) -> Tensor");
  m.def(
      "packed_linear_lora(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor work, "
      "Tensor pointers, Tensor ranks, Tensor dims, int[] members, float depth) -> Tensor");
  m.def(
      "group_terms(Tensor packed, int outputs, int rows, int[] members, float depth, Tensor? outs, Tensor? ins, "
      "Tensor[] turning, Tensor[] low_rank, Tensor? turned, Tensor[] turned_scales, Tensor[] turned_rotations, "
      "Tensor[] turned_low_rank) -> Tensor");
  m.def("packed_linear_terms(Tensor x, Tensor packed, Tensor? bias, Tensor terms) -> Tensor");
  m.def("level() -> int", level);
  m.def("max_level() -> int", max_level);
  m.def("set_level(int level) -> ()", set_level);
}

TORCH_LIBRARY_IMPL(deltaserve_cpu, CPU, m) {
  m.impl("prepare_work", prepare_work);
  m.impl("prepare_changes", prepare_changes);
  m.impl("lora_linear", lora_linear);
  m.impl("sparse_linear", sparse_linear);
  m.impl("paged_attention", paged_attention);
  m.impl("write_kv", write_kv);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_changed", rms_norm_changed);
  m.impl("gated_product", gated_product);
  m.impl("rotate_and_store", rotate_and_store);
  m.impl("scale_shift", scale_shift);
  m.impl("rotate_blocks", rotate_blocks);
  m.impl("block_linear", block_linear);
  m.impl("dense_linear", dense_linear);
  m.impl("add_modules", add_modules);
  m.impl("change_rows", change_rows);
  m.impl("changed_embeddings", changed_embeddings);
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_weight", unpack_weight);
  m.impl("packed_linear", packed_linear);
  m.impl("packed_linear_lora", packed_linear_lora);
  m.impl("group_terms", group_terms);
  m.impl("packed_linear_terms", packed_linear_terms);
}
