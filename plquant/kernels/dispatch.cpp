// plquant::few_rows as torch's dispatcher calls it, with no Python between it and the kernel: token by token, that takes
// as long as a small model's products themselves. ops.py defines it; torch's stable interface needs torch 2.10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Kernel = void (*)(const Weight*, const void*, int32_t, int32_t, int64_t, const float*, const void*, void*, int32_t);

static Kernel kernel;
static int64_t most_rows;

static int32_t dtype_of(const Tensor& tensor) {
  ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "Expected argument `scale` to be float32, bfloat16 or float16");
  return type == ScalarType::Float ? F32 : type == ScalarType::BFloat16 ? BF16 : F16;
}

static void check(const Tensor& tensor, const char* name, bool dtype, int64_t numbers) {
  STD_TORCH_CHECK(dtype && tensor.is_contiguous() && tensor.numel() == numbers, "Expected argument `", name,
                  "` to be contiguous, of ", numbers, " numbers, and of its dtype");
}

static Tensor few_rows(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       const std::optional<Tensor>& bias, int64_t out_features, int64_t in_features, int64_t bits,
                       int64_t group_size, bool along_out) {
  int64_t width = along_out ? out_features : in_features, rows = in_features > 0 ? x.numel() / in_features : 0;
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "Expected argument `bits` to be 2 to 8");
  STD_TORCH_CHECK(group_size > 0 && width % group_size == 0, "Expected argument `group_size` to divide ", width);
  STD_TORCH_CHECK(rows >= 1 && rows <= most_rows, "Expected argument `x` to have 1 to ", most_rows, " rows");
  Weight w{(const int16_t*)codes.const_data_ptr(), scale.const_data_ptr(),
           zero_point ? (const uint8_t*)zero_point->const_data_ptr() : nullptr, out_features, in_features, group_size,
           (int32_t)bits, along_out, dtype_of(scale), (int32_t)torch::stable::get_num_threads()};
  Shape s(w);
  int64_t groups = s.groups * (along_out ? s.padded_k : s.tiles * 16);
  check(x, "x", x.scalar_type() == ScalarType::BFloat16 && x.size(-1) == in_features, rows * in_features);
  check(codes, "codes", codes.scalar_type() == ScalarType::Short, s.tiles * s.units * bits * 32);
  check(scale, "scale", true, groups);
  if (zero_point) check(*zero_point, "zero_point", zero_point->scalar_type() == ScalarType::Byte, groups);
  if (bias) check(*bias, "bias", bias->scalar_type() == ScalarType::BFloat16, out_features);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  kernel(&w, x.const_data_ptr(), BF16, 1, rows, nullptr, bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), BF16);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(plquant, CPU, m) { m.impl("few_rows", TORCH_BOX(&few_rows)); }

// Called once, right after the library is opened.
extern "C" void plquant_dispatch(Kernel few, int64_t most) { kernel = few, most_rows = most; }
