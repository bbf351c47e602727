// Multi-adapter operators for CPUs: argument checks, work split, and which kernels do it.
//
// build.py compiles this unit and one for each instruction set (kernels_*.cpp, all of kernels.inc) and links them; the
// best one the machine has is chosen when the library is loaded. PyTorch releases the GIL around these calls.

#include "tables.inc"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

namespace deltaserve {
namespace {

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

}  // namespace deltaserve
