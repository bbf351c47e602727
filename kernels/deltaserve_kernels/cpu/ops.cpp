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

// ---- Element types --------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DS_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
DS_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
DS_INLINE float to_float(float x) { return x; }
DS_INLINE float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
DS_INLINE float to_float(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = bits_to_float(rest << 13) * bits_to_float(0x77800000u);  // 2^112 moves the exponent's bias
  return bits_to_float(sign | float_to_bits(magnitude));
}
template <class T>
T from_float(float x);
template <>
DS_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DS_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fc0};
  return {(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
DS_INLINE f16 from_float<f16>(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
  if (size >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};
  if (size < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded value in the low bits
    return {(uint16_t)(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000u))};
  return {(uint16_t)(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13))};
}

// ---- What kernels are given -----------------------------------------------------------------------------------------

template <class T>
struct ExpandPart {
  const T* b;  // [rank, n_size]
  int64_t rank, h_start;
};
template <class T>
struct SparsePart {
  const int32_t* indptr;
  const int32_t* cols;
  const T* values;
  float scale;
  int64_t nnz;
};
template <class T>
struct AttendTask {
  const T* q;  // first row and head of this task's sequence and kv head
  const T* k;  // first position of this kv head in block 0
  const T* v;
  T* out;
  const int32_t* blocks;
  const float* sinks;  // of this kv head's heads, or null
  float* scratch;
  int64_t q_stride_row, q_stride_head, out_stride_row;
  int64_t k_stride_block, k_stride_pos, v_stride_block, v_stride_pos;
  int64_t q_begin, q_end, pos, group, d_size, window;  // pos: position of the sequence's first query; window 0: none
  float scale, softcap;                                // softcap 0: none
  const T *k_after, *v_after;  // the block that this thread will read after this task, or null: fetched early
};

// A row that uses an adapter: y[row] += h . b, b [rank, columns]
template <class T>
struct Use {
  int64_t row;
  const T* b;
  int64_t rank, columns;
  const float* h;
};

// A row that uses an adapter's vectors: a value v becomes v * (1 + at * (scale - 1)) + at * bias. Either may be null.
// The scales of a norm are differences instead: v * (gain + at * scale).
struct Change {
  int64_t row;
  const float *scale, *bias;
  float at;
};

// Some columns of a matrix [rows, ...] that will be read soon.
constexpr int64_t kStripBytes = 128;  // of each row
struct Strip {
  const char* start;
  int64_t stride, rows, element = 0;  // bytes of an element, by which a walk's offset counts
};
// A walk over strips that brings a few rows at a time into the caches, beside arithmetic that leaves memory idle.
struct Ahead {
  const Strip* strips;
  int64_t num_strips, offset;  // elements from the strips' starts
  int64_t num_rows;            // of all strips
  int64_t rows_at_once = 0, row = 0;

  DS_INLINE void spread(int64_t steps) { rows_at_once = (num_rows + steps - 1) / steps; }

  DS_INLINE void step() {
    for (int64_t i = 0; i < rows_at_once && num_strips > 0; ++i) {
      const char* at = strips->start + row * strips->stride + offset * strips->element;
      __builtin_prefetch(at, 0, 2);  // level 2: level 1 is full of what is multiplied
      __builtin_prefetch(at + 64, 0, 2);
      if (++row == strips->rows) row = 0, ++strips, --num_strips;
    }
  }
};

template <class T>
struct Kernels {
  void (*shrink)(const T* const*, int64_t, const T*, int64_t, int64_t, float*, int64_t, const T*);
  void (*expand)(T* const*, int64_t, const ExpandPart<T>*, int, int64_t, int64_t, int64_t, const float*, int64_t);
  void (*sparse_stage)(const T* const*, int64_t, int64_t, float*);
  void (*sparse_row)(const float*, T*, const SparsePart<T>*, int, int64_t, float*, Ahead);
  void (*sparse_rows)(const float*, T* const*, int64_t, const SparsePart<T>*, int, int64_t);
  void (*attend)(const AttendTask<T>&);
  void (*rms_norm_row)(T*, const T*, const T*, int64_t, float, float, const Change*, int64_t, const float*);
  void (*gated_row)(T*, const T*, const T*, int64_t, int);
  void (*rotate_head)(T*, const T*, const T*, const T*, int64_t, int64_t);
  void (*widen)(const T*, float*, int64_t);
  void (*gemm_group)(const float*, int64_t, int64_t, const T*, int, float*, float*, Ahead*);
  void (*add_uses)(const Use<T>*, int64_t, float*, int64_t, int64_t, int);
  void (*gemm_finish)(T*, int64_t, int64_t, const float*, int64_t, int64_t, const T*);
  void (*change_sums)(const Change*, int64_t, float*, int64_t, int64_t, int, const T*);
  void (*widen_changed)(const T*, float*, int64_t, const Change*, int64_t, const float*);
  void (*sign_tables)(const float*, int64_t, float*);
  void (*sign_sums)(const float*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, float*, uint32_t*);
  void (*matrix_sums)(const float*, int64_t, int64_t, const T*, int64_t, int64_t, float*, int64_t);
  void (*stage_row)(const T*, float*, int64_t);
  void (*shrink_wide)(const float*, int64_t, int64_t, const T*, int64_t, int64_t, float*, int64_t);
  void (*expand_wide)(float*, int64_t, int64_t, const T*, int64_t, int64_t, const float*, int64_t, const float*, float);
  void (*activate_row)(float*, const float*, int64_t, int);
  void (*narrow)(const float*, T*, int64_t);
  void (*rotate_rows)(float*, const float*, int64_t, int64_t, const T*, int64_t, int64_t);
  void (*add_row)(T*, const float*, int64_t);
};

// Blocking of gemm.inc: k of one widened block of a panel (16 KiB, half of a level 1 cache), and the rows whose fp32
// copies stay in half of a level 2 cache.
constexpr int64_t kGemmDepth = 256;
constexpr int kGroupPanels = 4;  // panels whose sums are held together: 64 outputs, two cache lines of an adapter's row
constexpr int64_t kSignBlock = 32;  // outputs whose signs are looked up at once, apart.inc's
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

// ---- Choice of instruction set --------------------------------------------------------------------------------------

int64_t machine_level() {
#if DS_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}
const int64_t kMachineLevel = machine_level();
std::atomic<int64_t> g_level{kMachineLevel};

int64_t level() { return g_level.load(std::memory_order_relaxed); }
int64_t max_level() { return kMachineLevel; }
void set_level(int64_t value) {
  TORCH_CHECK_VALUE(0 <= value && value <= kMachineLevel, "level ", value, " is not in 0..", kMachineLevel);
  g_level.store(value, std::memory_order_relaxed);
}

#define DS_PICK(ns)                                                 \
  if constexpr (std::is_same_v<T, float>) return ns::kFloat;        \
  else if constexpr (std::is_same_v<T, bf16>) return ns::kBfloat16; \
  else return ns::kHalf

template <class T>
const Kernels<T>& kernels() {
#if DS_X86
  switch (level()) {
    case 3:
      if constexpr (std::is_same_v<T, bf16>) return avx512_bf16::kBfloat16;
      [[fallthrough]];
    case 2: DS_PICK(avx512);
    case 1: DS_PICK(avx2);
  }
#endif
  DS_PICK(portable);
}

// ---- Parallel work --------------------------------------------------------------------------------------------------

// Runs task(i, scratch) for i in [0, count), handed out in order to whichever thread is free; scratch holds
// `scratch_floats` floats. `cost` is in multiply-adds: small work stays on the calling thread.
constexpr int64_t kSerialCost = 200000;

float* thread_scratch(int64_t floats) {
  thread_local std::vector<float> buffer;
  if ((int64_t)buffer.size() < floats + 16) buffer.resize(floats + 16);
  return (float*)(((uintptr_t)buffer.data() + 63) & ~(uintptr_t)63);
}

#include "pool.inc"

template <class F>
void run_tasks(int64_t count, int64_t scratch_floats, int64_t cost, const F& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  const auto one = [&](int64_t i) { task(i, thread_scratch(scratch_floats)); };
  const auto run = [](const void* context, int64_t i) { (*(const decltype(one)*)context)(i); };
  if (threads > 1 && cost >= kSerialCost && !at::in_parallel_region() && Pool::get().run(threads, count, run, &one)) return;
  for (int64_t i = 0; i < count; ++i) one(i);
}

template <class F>
void with_type(const at::Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(bf16{});
    case at::kHalf: return f(f16{});
    default:
      TORCH_CHECK_VALUE(false, name, " is ", tensor.scalar_type(), "; allowed: float32, bfloat16, float16");
  }
}

#include "work.inc"
#include "linear.inc"
#include "changes_ops.inc"
#include "paged_attention.inc"
#include "pointwise_ops.inc"
#include "packed_linear.inc"
#include "packed_terms.inc"
#include "vector_ops.inc"
#include "rotation_ops.inc"
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
      "dense_linear(Tensor(a!) y, Tensor x, Tensor work, Tensor pointers, Tensor dims, int[] members, float depth) -> ()");
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
      "packed_linear_terms(Tensor x, Tensor packed, int outputs, Tensor? bias, int[] members, float depth, Tensor? outs, "
      "Tensor? ins, Tensor[] fed, int[] fed_members, Tensor? work, Tensor? pointers, Tensor? ranks, Tensor? dims) -> Tensor");
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
  m.impl("packed_linear_terms", packed_linear_terms);
}
