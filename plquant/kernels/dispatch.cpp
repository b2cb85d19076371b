// Products of few rows, and Kronecker products, as torch's dispatcher calls them, with no Python between it and the
// kernels: token by token, that takes as long as a small model's products themselves. ops.py defines these ops; torch's
// stable interface needs torch 2.10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = const std::optional<Tensor>&;

// The same struct in native.py.
struct Kernels {
  void (*few_rows)(const Weight*, const void*, int32_t, int32_t, int64_t, const float*, const void*, void*, int32_t);
  void (*integer_rows)(const Weight*, const int8_t*, int64_t, const float*, const int32_t*, const void*, void*, int32_t);
  void (*quantize_rows)(const void*, int32_t, int64_t, int64_t, int32_t, int32_t, const float*, const float*, float*,
                        float*, int8_t*, int32_t*, int32_t*, int32_t);
  void (*kronecker)(const void*, const void*, const void*, float, void*, int64_t, int64_t, int64_t, int32_t);
  int64_t most_rows, most_inputs, most_order;
};

static Kernels kernels;

static void expect(bool fits, const char* name, const char* expected) {
  STD_TORCH_CHECK(fits, "Expected argument `", name, "` to be ", expected);
}

static void check(const Tensor& tensor, const char* name, bool dtype, int64_t numbers) {
  STD_TORCH_CHECK(dtype && tensor.is_contiguous() && tensor.numel() == numbers, "Expected argument `", name,
                  "` to be contiguous, of ", numbers, " numbers, and of its shape and dtype");
}

static bool is(const Tensor& tensor, ScalarType type) { return tensor.scalar_type() == type; }

template <class T>
static const T* pointer(Maybe tensor) {
  return tensor ? (const T*)tensor->const_data_ptr() : nullptr;
}

static int32_t dtype_of(const Tensor& tensor) {
  expect(is(tensor, ScalarType::Float) || is(tensor, ScalarType::BFloat16) || is(tensor, ScalarType::Half), "scale",
         "float32, bfloat16 or float16");
  return is(tensor, ScalarType::Float) ? F32 : is(tensor, ScalarType::BFloat16) ? BF16 : F16;
}

namespace {

// A product of a few rows: its arguments, checked, and room for the result.
struct Product {
  Weight w;
  int64_t rows;
  const void *x, *bias;
  Tensor y;

  static Weight weight(const Tensor& codes, const Tensor& scale, Maybe zero_point, int64_t out_features, int64_t in_features,
                       int64_t bits, int64_t group_size, bool along_out) {
    int64_t width = along_out ? out_features : in_features;
    expect(bits >= 2 && bits <= 8, "bits", "2 to 8");
    expect(in_features > 0, "in_features", "positive");
    expect(group_size > 0 && width % group_size == 0, "group_size", "a divisor of the width that is grouped");
    Weight w{(const int16_t*)codes.const_data_ptr(), scale.const_data_ptr(), pointer<uint8_t>(zero_point), out_features,
             in_features, group_size, (int32_t)bits, along_out, dtype_of(scale), (int32_t)torch::stable::get_num_threads()};
    Shape s(w);
    int64_t groups = s.groups * (along_out ? s.padded_k : s.tiles * 16);
    bool tiled = codes.dim() == 4 && codes.size(0) == s.tiles && codes.size(1) == s.units;
    check(codes, "codes", is(codes, ScalarType::Short) && tiled, s.tiles * s.units * bits * 32);
    bool grouped = along_out ? scale.dim() == 2 : scale.dim() == 3 && scale.size(1) == s.groups;
    check(scale, "scale", grouped && scale.size(0) == (along_out ? s.groups : s.tiles), groups);
    if (zero_point) check(*zero_point, "zero_point", is(*zero_point, ScalarType::Byte), groups);
    return w;
  }

  static Tensor room(const Tensor& x, const Weight& w) {
    int64_t rows = x.numel() / w.in_features;
    STD_TORCH_CHECK(rows >= 1 && rows <= kernels.most_rows, "Expected argument `x` to have 1 to ", kernels.most_rows, " rows");
    check(x, "x", is(x, ScalarType::BFloat16) && x.size(-1) == w.in_features, rows * w.in_features);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = w.out_features;
    return torch::stable::new_empty(x, sizes);
  }

  Product(const Weight& weight, const Tensor& x, Maybe bias)
      : w(weight), rows(x.numel() / w.in_features), x(x.const_data_ptr()), bias(pointer<void>(bias)), y(room(x, w)) {
    if (bias) check(*bias, "bias", is(*bias, ScalarType::BFloat16), w.out_features);
  }
};

}  // namespace

static Tensor few_rows(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe zero_point, Maybe bias,
                       int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, bool along_out) {
  Product p(Product::weight(codes, scale, zero_point, out_features, in_features, bits, group_size, along_out), x, bias);
  kernels.few_rows(&p.w, p.x, BF16, 1, p.rows, nullptr, p.bias, p.y.mutable_data_ptr(), BF16);
  return p.y;
}

static Tensor few_quantized_rows(const Tensor& x, const Tensor& codes, const Tensor& scale, Maybe zero_point, Maybe bias,
                                 int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size,
                                 bool along_out, int64_t x_bits, bool x_symmetric, Maybe x_offset, Maybe x_clip) {
  Product p(Product::weight(codes, scale, zero_point, out_features, in_features, bits, group_size, along_out), x, bias);
  expect(x_bits >= 2 && x_bits <= 8, "x_bits", "2 to 8");
  if (x_offset) check(*x_offset, "x_offset", is(*x_offset, ScalarType::Float), in_features);
  if (x_clip) check(*x_clip, "x_clip", is(*x_clip, ScalarType::Float), 2);
  bool integers = !along_out && group_size <= kernels.most_inputs;
  static thread_local std::vector<float> steps, scales;
  static thread_local std::vector<int8_t> values;
  static thread_local std::vector<int32_t> zeros, sums;
  scales.resize(p.rows), zeros.resize(p.rows), sums.resize(p.rows);
  integers ? values.resize(p.rows * in_features) : steps.resize(p.rows * in_features);
  kernels.quantize_rows(p.x, BF16, p.rows, in_features, x_bits, x_symmetric, pointer<float>(x_offset), pointer<float>(x_clip),
                        integers ? nullptr : steps.data(), scales.data(), values.data(), zeros.data(), sums.data(),
                        p.w.threads);
  void* y = p.y.mutable_data_ptr();
  if (integers) kernels.integer_rows(&p.w, values.data(), p.rows, scales.data(), zeros.data(), p.bias, y, BF16);
  else kernels.few_rows(&p.w, steps.data(), F32, 1, p.rows, scales.data(), p.bias, y, BF16);
  return p.y;
}

static Tensor kronecker(const Tensor& x, const Tensor& left, const Tensor& right, double factor) {
  expect(left.dim() > 0 && right.dim() > 0, "left", "a matrix as `right` is");
  int64_t n1 = left.size(0), n2 = right.size(0);
  expect(is(x, ScalarType::BFloat16), "x", "bfloat16");
  expect(x.dim() > 0 && x.size(-1) == n1 * n2, "x", "as wide as the product of its factors");
  expect(n1 <= kernels.most_order && n2 <= kernels.most_order, "left", "of no more rows than a factor may have");
  check(left, "left", is(left, ScalarType::BFloat16) && left.dim() == 2, n1 * n1);
  check(right, "right", is(right, ScalarType::BFloat16) && right.dim() == 2, n2 * n2);
  Tensor rows = torch::stable::contiguous(x), y = torch::stable::empty_like(rows);
  if (rows.numel())
    kernels.kronecker(rows.const_data_ptr(), left.const_data_ptr(), right.const_data_ptr(), factor, y.mutable_data_ptr(),
                      rows.numel() / (n1 * n2), n1, n2, torch::stable::get_num_threads());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(plquant, CPU, m) {
  m.impl("few_rows", TORCH_BOX(&few_rows));
  m.impl("few_quantized_rows", TORCH_BOX(&few_quantized_rows));
  m.impl("cpu_kronecker", TORCH_BOX(&kronecker));
}

// Called once, right after the library is opened.
extern "C" void plquant_dispatch(const Kernels* found) { kernels = *found; }
