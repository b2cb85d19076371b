// Products with weights of 2 to 8 bits on a CPU with AVX512-BF16; cpu_layout.py says how the codes lie.
//
// A code is an integer below 257, which bf16 holds exactly, and so does fp32 the product with a bf16 activation. fp16
// and fp32 activations are split into 2 and 3 bf16 numbers whose sum they are, so that nothing but the order of fp32
// additions depends on the dtype. Scale and zero-point are applied to the sums of a group:
//
//     y[n] = sum_g scale[g, n] (sum_k x[k] code[n, k] - zero_point[g, n] sum_k x[k])         groups along the input
//     y[n] = sum_k (x[k] scale[g(n), k]) code[n, k] - sum_k (x[k] scale[g(n), k]) zero_point[g(n), k]       the output
//
// Letters: N outputs, K inputs, 16 outputs are a tile, 32 inputs a unit, P parts of an activation, R = M P rows.

#include "cpu.h"

// What a code of 6 or 7 bits is multiplied as, less the code: see Step.
static inline __m512 raised(const Weight& w, __m512 zero_point) {
  return w.bits == 6 || w.bits == 7 ? _mm512_add_ps(zero_point, _mm512_set1_ps(128)) : zero_point;
}

template <int B>
static __m512i make_table() {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; i++) {
    float value = (float)(i & ((1 << std::min(B, 5)) - 1));
    uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    table[i] = word >> 16;
  }
  return _mm512_load_si512(table);
}

// ---- few rows --------------------------------------------------------------------------------------------------------

// Activations as bf16 rows, two inputs of each side by side: values [sets, padded K / 2, R, 2], sums [sets, R, groups]; a
// set for each group of outputs.
struct Rows {
  int64_t count, sets, groups;
  std::vector<int32_t> values;
  std::vector<float> sums;
};

static void split(const Weight& w, const Shape& s, const void* x, int dtype, int64_t m, int parts, Rows& rows) {
  int64_t pieces = w.along_out ? 1 : s.groups, size = w.along_out ? w.in_features : s.size;
  int64_t padded = w.along_out ? s.padded_k : s.padded_size;
#pragma omp parallel for num_threads(w.threads) if (rows.sets > 1 && w.threads > 1)
  for (int64_t set = 0; set < rows.sets; set++)
    for (int64_t i = 0; i < m; i++)
      for (int64_t g = 0; g < pieces; g++) {
        __m512 sums[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t k = 0; k < size; k += 16) {
          __mmask16 mask = lanes(size - k);
          __m512 v = load16(x, i * w.in_features + g * size + k, dtype, mask);
          __m512 z = _mm512_set1_ps(1);
          if (w.along_out) {
            v = _mm512_mul_ps(v, load16(w.scale, set * s.padded_k + k, w.scale_dtype));
            z = raised(w, zero_points(w, set * s.padded_k + k));
          }
          for (int p = 0; p < parts; p++) {
            __m256i half = to_bf16(v);
            alignas(32) int32_t pairs[8];
            _mm256_store_si256((__m256i*)pairs, half);
            int32_t* to = rows.values.data() + (set * s.padded_k + g * padded + k) / 2 * rows.count;
            for (int64_t j = 0; j < 8; j++) to[j * rows.count + i * parts + p] = pairs[j];
            __m512 rounded = load16(&half, 0, BF16);
            sums[p] = _mm512_fmadd_ps(rounded, z, sums[p]);
            v = _mm512_sub_ps(v, rounded);
          }
        }
        for (int p = 0; p < parts; p++)
          rows.sums[(set * rows.count + i * parts + p) * pieces + g] = _mm512_reduce_add_ps(sums[p]);
      }
}

template <int B, int R, int E>
struct Step {
  __m512i table;
  template <int I>
  ALWAYS_INLINE void one(const __m512i* z, const int32_t* x, __m512 (&acc)[R][E]) const {
    if constexpr (I < 16) {
      __m512i q = code<B, I>(z), w;
      if constexpr (B <= 5) w = _mm512_permutexvar_epi16(q, table);
      else if constexpr (B <= 7)  // 128 + code, as a bit pattern
        w = _mm512_ternarylogic_epi32(q, _mm512_set1_epi16((1 << B) - 1), _mm512_set1_epi16(0x4300), 0xea);
      else {  // an integer below 256 has nothing in the lower half of its fp32
        __m512i low = _mm512_and_si512(q, _mm512_set1_epi32(255)), next = _mm512_srli_epi32(_mm512_slli_epi32(q, 8), 24);
        w = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(low)), 16);
        w = _mm512_or_si512(w, _mm512_castps_si512(_mm512_cvtepi32_ps(next)));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        __m512i pair = _mm512_set1_epi32(x[I * R + r]);
        acc[r][I % E] = _mm512_dpbf16_ps(acc[r][I % E], (__m512bh)w, (__m512bh)pair);
      }
      one<I + 1>(z, x, acc);
    }
  }
};

struct Output {
  void* y;
  const void* bias;
  const float* row_scale;
  int dtype;
  int64_t m;
  int parts;
};

// T tiles are read side by side. While unit u of each is, this many vectors further on lies what will be read when another
// 2048 bytes of each have been: in the same tile, or near its end in the tile that is T further on.
template <int B, int T>
static inline int64_t ahead_of(const Shape& s, int64_t u) {
  int64_t units = (32 + B - 1) / B;
  return (u + units < s.units ? units : units + (T - 1) * s.units) * B;
}

// T tiles from the given one on, R rows.
template <int B, int R, int T>
static void some_tiles(const Weight& w, const Shape& s, const Rows& rows, const Output& out, int64_t tile) {
  constexpr int E = R == 1 ? 2 : 1;
  Step<B, R, E> step{make_table<B>()};
  int64_t set = w.along_out ? tile * 16 / s.padded_size : 0, groups = w.along_out ? 1 : s.groups;
  int64_t units = s.units / groups;
  const int32_t* x = rows.values.data() + set * s.padded_k / 2 * R;
  const float* sums = rows.sums.data() + set * rows.count * groups;
  const __m512i* codes = (const __m512i*)w.codes + tile * s.units * B;
  __m512 total[T][R];
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[t][r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512 acc[T][R][E];
    for (int t = 0; t < T; t++)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        for (int e = 0; e < E; e++) acc[t][r][e] = _mm512_setzero_ps();
    for (int64_t u = g * units; u < (g + 1) * units; u++) {
      int64_t ahead = ahead_of<B, T>(s, u);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const __m512i* z = codes + (t * s.units + u) * B;
        for (int b = 0; b < B; b++) _mm_prefetch((const char*)(z + ahead + b), _MM_HINT_T0);
        step.template one<0>(z, x + u * 16 * R, acc[t]);
      }
    }
    for (int t = 0; t < T; t++) {
      int64_t at = s.scales(tile + t, g);
      __m512 scale = w.along_out ? _mm512_set1_ps(1) : load16(w.scale, at, w.scale_dtype);
      __m512 zero = w.along_out ? _mm512_set1_ps(1) : raised(w, zero_points(w, at));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        __m512 a = E == 2 ? _mm512_add_ps(acc[t][r][0], acc[t][r][E - 1]) : acc[t][r][0];
        a = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[r * groups + g]), a);
        total[t][r] = _mm512_fmadd_ps(scale, a, total[t][r]);
      }
    }
  }
  for (int t = 0; t < T; t++) {
    int64_t first = s.first(w, tile + t);
    __mmask16 mask = lanes(s.valid(w, tile + t));
    __m512 bias = out.bias ? load16(out.bias, first, out.dtype, mask) : _mm512_setzero_ps();
    for (int64_t m = 0; m < out.m; m++) {
      __m512 v = _mm512_setzero_ps();
      for (int p = 0; p < out.parts; p++) v = _mm512_add_ps(v, total[t][m * out.parts + p]);
      if (out.row_scale) v = _mm512_mul_ps(v, _mm512_set1_ps(out.row_scale[m]));
      store16(out.y, m * w.out_features + first, out.dtype, _mm512_add_ps(v, bias), mask);
    }
  }
}

template <int B, int R>
static void all_tiles(const Weight& w, const Shape& s, const Rows& rows, const Output& out) {
  constexpr int T = R >= 8 ? 1 : 4;
  int64_t run = s.tiles / rows.sets, per_run = (run + T - 1) / T;
#pragma omp parallel for num_threads(w.threads) if (w.threads > 1)
  for (int64_t i = 0; i < rows.sets * per_run; i++) {
    int64_t tile = i / per_run * run + i % per_run * T, end = std::min(tile + T, (i / per_run + 1) * run);
    if (tile + T == end) some_tiles<B, R, T>(w, s, rows, out, tile);
    else for (; tile < end; tile++) some_tiles<B, R, 1>(w, s, rows, out, tile);
  }
}

template <int B>
static void all_rows(const Weight& w, const Shape& s, const Rows& rows, const Output& out) {
  switch (rows.count) {
    case 1: return all_tiles<B, 1>(w, s, rows, out);
    case 2: return all_tiles<B, 2>(w, s, rows, out);
    case 4: return all_tiles<B, 4>(w, s, rows, out);
    case 8: return all_tiles<B, 8>(w, s, rows, out);
    default: return all_tiles<B, 16>(w, s, rows, out);
  }
}

static void one_pass(const Weight& w, const Shape& s, const void* x, int x_dtype, int parts, int64_t m,
                     const float* row_scale, const void* bias, void* y, int y_dtype) {
  if (!s.tiles) return;
  static thread_local Rows rows;
  rows.count = 1;
  while (rows.count < m * parts) rows.count *= 2;
  rows.sets = w.along_out ? s.groups : 1;
  rows.groups = w.along_out ? 1 : s.groups;
  rows.values.assign(rows.sets * rows.count * s.padded_k / 2, 0);
  rows.sums.assign(rows.sets * rows.count * rows.groups, 0);
  split(w, s, x, x_dtype, m, parts, rows);
  Output out{y, bias, row_scale, y_dtype, m, parts};
  switch (w.bits) {
    case 2: return all_rows<2>(w, s, rows, out);
    case 3: return all_rows<3>(w, s, rows, out);
    case 4: return all_rows<4>(w, s, rows, out);
    case 5: return all_rows<5>(w, s, rows, out);
    case 6: return all_rows<6>(w, s, rows, out);
    case 7: return all_rows<7>(w, s, rows, out);
    default: return all_rows<8>(w, s, rows, out);
  }
}

// y [M, N] = x [M, K] W^T row_scale + bias, x, y and bias of one dtype unless x holds integers (x_dtype 0, 1 part).
extern "C" void plquant_few_rows(const Weight* weight, const void* x, int32_t x_dtype, int32_t parts, int64_t m,
                                 const float* row_scale, const void* bias, void* y, int32_t y_dtype) {
  const Weight& w = *weight;
  Shape s(w);
  int64_t step = 16 / parts, x_bytes = w.in_features * size_of(x_dtype), y_bytes = w.out_features * size_of(y_dtype);
  for (int64_t i = 0; i < m; i += step)
    one_pass(w, s, (const char*)x + i * x_bytes, x_dtype, parts, std::min(step, m - i), row_scale ? row_scale + i : nullptr,
             bias, (char*)y + i * y_bytes, y_dtype);
}

// ---- rows of integers ------------------------------------------------------------------------------------------------

template <int B, int R>
struct Quads {
  template <int I>
  static ALWAYS_INLINE void one(const __m512i* z, const int32_t* x, __m512i (&acc)[R], __m512i& sum) {
    if constexpr (I < 8) {
      __m512i q = quad<B, I>(z);
      sum = _mm512_dpbusd_epi32(sum, q, _mm512_set1_epi8(1));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r] = _mm512_dpbusd_epi32(acc[r], q, _mm512_set1_epi32(x[I * R + r]));
      one<I + 1>(z, x, acc, sum);
    }
  }
};

// Rows of signed codes. R of them, a block, lie side by side: values [blocks, padded K / 4, R], four codes each, in the
// order of quads; what fills the last block up is zero.
struct Integers {
  const int32_t *values, *zero, *sum;  // of which [rows], [rows, groups]
  const float* scale;
  const void* bias;
  char* y;
  int32_t dtype;
  int64_t m;

  Integers from(const Weight& w, const Shape& s, int64_t row) const {
    return {values + row * s.padded_k / 4, zero + row, sum + row * s.groups, scale + row, bias,
            y + row * w.out_features * size_of(dtype), dtype, m - row};
  }
};

static void arrange(const Weight& w, const Shape& s, const int8_t* x, int64_t m, int64_t block, int32_t* values, int32_t* sums) {
#pragma omp parallel for num_threads(w.threads) if (w.threads > 1 && m > 16)
  for (int64_t i = 0; i < m; i++)
    for (int64_t g = 0; g < s.groups; g++) {
      __m256i sum = _mm256_setzero_si256();
      for (int64_t k = 0; k < s.size; k += 32) {
        __mmask32 mask = s.size - k >= 32 ? 0xffffffffu : (1u << (s.size - k)) - 1;
        __m256i v = _mm256_maskz_loadu_epi8(mask, x + i * w.in_features + g * s.size + k);
        sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), v);
        __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        alignas(16) int32_t quads[8];
        _mm_store_si128((__m128i*)quads, _mm_unpacklo_epi8(low, high));
        _mm_store_si128((__m128i*)quads + 1, _mm_unpackhi_epi8(low, high));
        int32_t* to = values + i / block * block * s.padded_k / 4 + (g * s.padded_size + k) / 4 * block + i % block;
        for (int64_t q = 0; q < 8; q++) to[q * block] = quads[q];
      }
      alignas(32) int32_t parts[8];
      _mm256_store_si256((__m256i*)parts, sum);
      for (int32_t part : parts) sums[i * s.groups + g] += part;
    }
}

template <int B, int R, int T>
static void integer_tiles(const Weight& w, const Shape& s, const Integers& in, int64_t tile) {
  int64_t units = s.units / s.groups;
  const __m512i* codes = (const __m512i*)w.codes + tile * s.units * B;
  __m512 total[T][R];
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[t][r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < s.groups; g++) {
    __m512i acc[T][R], sum[T];
    for (int t = 0; t < T; t++) {
      sum[t] = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[t][r] = _mm512_setzero_si512();
    }
    for (int64_t u = g * units; u < (g + 1) * units; u++) {
      int64_t ahead = ahead_of<B, T>(s, u);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const __m512i* z = codes + (t * s.units + u) * B;
        for (int b = 0; b < B; b++) _mm_prefetch((const char*)(z + ahead + b), _MM_HINT_T0);
        Quads<B, R>::template one<0>(z, in.values + u * 8 * R, acc[t], sum[t]);
      }
    }
    for (int t = 0; t < T; t++) {
      int64_t at = s.scales(tile + t, g);
      __m512 scale = load16(w.scale, at, w.scale_dtype);
      __m512i zero = _mm512_cvtps_epi32(zero_points(w, at));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {  // exact, also where a part of it wraps around
        __m512i rest = _mm512_set1_epi32(in.sum[r * s.groups + g] - (int32_t)s.size * in.zero[r]);
        __m512i n = _mm512_sub_epi32(acc[t][r], _mm512_mullo_epi32(_mm512_set1_epi32(in.zero[r]), sum[t]));
        n = _mm512_sub_epi32(n, _mm512_mullo_epi32(zero, rest));
        total[t][r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(n), total[t][r]);
      }
    }
  }
  for (int t = 0; t < T; t++) {
    int64_t first = s.first(w, tile + t);
    __mmask16 mask = lanes(s.valid(w, tile + t));
    __m512 bias = in.bias ? load16(in.bias, first, in.dtype, mask) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      if (r < in.m)
        store16(in.y, r * w.out_features + first, in.dtype,
                _mm512_add_ps(_mm512_mul_ps(total[t][r], _mm512_set1_ps(in.scale[r])), bias), mask);
  }
}

template <int B, int R>
static void all_integer_tiles(const Weight& w, const Shape& s, const Integers& in) {
  constexpr int T = R >= 16 ? 1 : 4;
#pragma omp parallel for num_threads(w.threads) if (w.threads > 1)
  for (int64_t tile = 0; tile < s.tiles; tile += T)
    for (int64_t row = 0; row < in.m; row += R) {
      Integers block = in.from(w, s, row);
      if (tile + T <= s.tiles) integer_tiles<B, R, T>(w, s, block, tile);
      else for (int64_t t = tile; t < s.tiles; t++) integer_tiles<B, R, 1>(w, s, block, t);
    }
}

template <int B>
static void all_integer_rows(const Weight& w, const Shape& s, const Integers& in) {
  if (in.m == 1) return all_integer_tiles<B, 1>(w, s, in);
  if (in.m <= 4) return all_integer_tiles<B, 4>(w, s, in);
  return all_integer_tiles<B, 16>(w, s, in);
}

static void some_integer_rows(const Weight& w, const Shape& s, const int8_t* x, int64_t m, const float* scale,
                              const int32_t* zero, const void* bias, char* y, int32_t dtype) {
  int64_t block = m == 1 ? 1 : m <= 4 ? 4 : 16, rows = round_up(m, block);
  static thread_local std::vector<int32_t> values, zeros, sums;
  values.assign(rows * s.padded_k / 4, 0), zeros.assign(rows, 0), sums.assign(rows * s.groups, 0);
  std::copy(zero, zero + m, zeros.begin());
  arrange(w, s, x, m, block, values.data(), sums.data());
  Integers in{values.data(), zeros.data(), sums.data(), scale, bias, y, dtype, m};
  switch (w.bits) {
    case 2: return all_integer_rows<2>(w, s, in);
    case 3: return all_integer_rows<3>(w, s, in);
    case 4: return all_integer_rows<4>(w, s, in);
    case 5: return all_integer_rows<5>(w, s, in);
    case 6: return all_integer_rows<6>(w, s, in);
    case 7: return all_integer_rows<7>(w, s, in);
    default: return all_integer_rows<8>(w, s, in);
  }
}

// y [M, N] = x W^T scale + bias of rows of signed codes with their zero-points; groups along the input.
extern "C" void plquant_integer_rows(const Weight* weight, const int8_t* x, int64_t m, const float* scale,
                                     const int32_t* zero, const void* bias, void* y, int32_t dtype) {
  const Weight& w = *weight;
  Shape s(w);
  constexpr int64_t step = 512;  // as many are rearranged at once
  for (int64_t i = 0; i < m; i += step)
    some_integer_rows(w, s, x + i * w.in_features, std::min(step, m - i), scale + i, zero + i, bias,
                      (char*)y + i * w.out_features * size_of(dtype), dtype);
}

// ---- few rows, a weight of bf16 --------------------------------------------------------------------------------------

template <int R>
static void dense_rows(const uint16_t* x, const uint16_t* w, const void* bias, void* y, int64_t n, int64_t k,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < n; first += 16) {
    __mmask16 valid = lanes(n - first);
    alignas(64) float found[R][16] = {};
    for (int64_t i = first; i < std::min(first + 16, n); i++) {
      __m512 acc[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
      for (int64_t j = 0; j < k; j += 32) {
        __mmask32 mask = k - j >= 32 ? 0xffffffffu : (1u << (k - j)) - 1;
        __m512i v = _mm512_maskz_loadu_epi16(mask, w + i * k + j);
        _mm_prefetch((const char*)(w + i * k + j) + 4096, _MM_HINT_T0);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)v, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * k + j));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) found[r][i - first] = _mm512_reduce_add_ps(acc[r]);
    }
    __m512 add = bias ? load16(bias, first, BF16, valid) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) store16(y, r * n + first, BF16, _mm512_add_ps(_mm512_load_ps(found[r]), add), valid);
  }
}

// y [M, N] = x [M, K] W^T + bias, all bf16; at most 4 rows.
extern "C" void plquant_dense_rows(const uint16_t* x, const uint16_t* w, const void* bias, void* y, int64_t m, int64_t n,
                                   int64_t k, int32_t threads) {
  switch (m) {
    case 1: return dense_rows<1>(x, w, bias, y, n, k, threads);
    case 2: return dense_rows<2>(x, w, bias, y, n, k, threads);
    case 3: return dense_rows<3>(x, w, bias, y, n, k, threads);
    default: return dense_rows<4>(x, w, bias, y, n, k, threads);
  }
}

// ---- many rows -------------------------------------------------------------------------------------------------------

// Where a unit of a tile goes, as numbers of dtype D; Whole: all of its 32 inputs and 16 outputs are there.
template <int B, int D, bool Whole>
struct Unit {
  const Weight& w;
  const __m512i* codes;
  char* out;
  int64_t row_bytes, at, inputs;
  __mmask16 mask;

  template <int I>
  ALWAYS_INLINE void put(__m512 scale, __m512 zero) const {
    if constexpr (I < 16) {
      __m512i q = code<B, I>(codes), low = _mm512_set1_epi32((1 << B) - 1);
      __m512i both[2] = {_mm512_and_si512(q, low), _mm512_and_si512(_mm512_srli_epi32(q, 16), low)};
      for (int p = 0; p < 2; p++) {
        int k = 2 * I + p;
        if (!Whole && k >= inputs) return;
        if (w.along_out) {
          scale = _mm512_set1_ps(_mm512_cvtss_f32(load16(w.scale, at + k, w.scale_dtype, 1)));
          zero = _mm512_set1_ps(w.zero_point ? w.zero_point[at + k] : 1 << (B - 1));
        }
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(both[p]), zero), scale);
        if constexpr (!Whole) store16(out + k * row_bytes, 0, D, v, mask);
        else if constexpr (D == F32) _mm512_storeu_ps(out + k * row_bytes, v);
        else _mm256_storeu_si256((__m256i*)(out + k * row_bytes), to_bf16(v));
      }
      put<I + 1>(scale, zero);
    }
  }
};

template <int B, int D>
static void spread(const Weight& w, const Shape& s, int64_t tile, int64_t column, int64_t columns, char* out) {
  int64_t size = size_of(D), group = w.along_out ? tile * 16 / s.padded_size : 0;
  int64_t groups = w.along_out ? 1 : s.groups, units = s.units / groups, width = w.along_out ? w.in_features : s.size;
  __mmask16 mask = lanes(s.valid(w, tile));
  const __m512i* codes = (const __m512i*)w.codes + tile * s.units * B;
  for (int64_t g = 0; g < groups; g++) {
    __m512 scale = _mm512_setzero_ps(), zero = scale;
    int64_t at = s.scales(tile, g);
    if (!w.along_out) scale = load16(w.scale, at, w.scale_dtype), zero = zero_points(w, at);
    for (int64_t u = 0; u < units; u++) {
      char* first = out + ((g * width + u * 32) * columns + column) * size;
      const __m512i* z = codes + (g * units + u) * B;
      int64_t place = group * s.padded_k + u * 32, inputs = width - u * 32;
      if (mask == 0xffff && inputs >= 32) Unit<B, D, true>{w, z, first, columns * size, place, inputs, mask}.template put<0>(scale, zero);
      else Unit<B, D, false>{w, z, first, columns * size, place, inputs, mask}.template put<0>(scale, zero);
    }
  }
}

template <int B>
static void spread(const Weight& w, const Shape& s, int64_t tile, int64_t column, int64_t columns, void* out, int dtype) {
  if (dtype == F32) spread<B, F32>(w, s, tile, column, columns, (char*)out);
  else spread<B, BF16>(w, s, tile, column, columns, (char*)out);
}

// Tiles from `begin` to `end` of the weight, transposed, fp32 or bf16: out [K, columns], columns the outputs of these tiles.
extern "C" void plquant_dequantize(const Weight* weight, int64_t begin, int64_t end, int64_t columns, void* out,
                                   int32_t dtype) {
  const Weight& w = *weight;
  Shape s(w);
#pragma omp parallel for num_threads(w.threads) if (w.threads > 1)
  for (int64_t tile = begin; tile < end; tile++) {
    int64_t column = s.first(w, tile) - s.first(w, begin);
    switch (w.bits) {
      case 2: spread<2>(w, s, tile, column, columns, out, dtype); break;
      case 3: spread<3>(w, s, tile, column, columns, out, dtype); break;
      case 4: spread<4>(w, s, tile, column, columns, out, dtype); break;
      case 5: spread<5>(w, s, tile, column, columns, out, dtype); break;
      case 6: spread<6>(w, s, tile, column, columns, out, dtype); break;
      case 7: spread<7>(w, s, tile, column, columns, out, dtype); break;
      default: spread<8>(w, s, tile, column, columns, out, dtype);
    }
  }
}

// ---- activations -----------------------------------------------------------------------------------------------------

// Rows quantized each in its own range, as quant/token_quantize.py does, to the last bit: scales [M] and steps
// (code - zero_point), fp32 [M, K], or signed codes, int8 [M, K], with their zero-points and sums, int32 [M].
extern "C" void plquant_quantize_rows(const void* x, int32_t dtype, int64_t m, int64_t k, int32_t bits,
                                      int32_t symmetric, const float* offset, const float* clip, float* steps,
                                      float* scales, int8_t* codes, int32_t* zeros, int32_t* sums, int32_t threads) {
  float qmin = symmetric ? -(float)(1 << (bits - 1)) : 0, qmax = qmin + (float)((1 << bits) - 1);
#pragma omp parallel for num_threads(threads) if (threads > 1 && m > 16)
  for (int64_t i = 0; i < m; i++) {
    __m512 low = _mm512_setzero_ps(), high = low;
    __mmask16 nan = 0;  // which a minimum may lose
    for (int64_t j = 0; j < k; j += 16) {
      __m512 v = load16(x, i * k + j, dtype, lanes(k - j));
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
    }
    float lo = _mm512_reduce_min_ps(low), hi = _mm512_reduce_max_ps(high), zero = 0;
    if (clip) lo *= clip[0], hi *= clip[1];
    float scale = symmetric ? std::max(hi / qmax, lo / qmin) : (hi - lo) / (qmax - qmin);
    scale = std::max(scale, 1.17549435e-38f);
    if (!symmetric) zero = std::min(std::max(std::nearbyint(-lo / scale), qmin), qmax);
    scales[i] = nan ? NAN : scale;
    int32_t middle = symmetric ? 0 : 1 << (bits - 1), shift = (int32_t)zero - middle;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < k; j += 16) {
      __mmask16 mask = lanes(k - j);
      __m512 v = _mm512_div_ps(load16(x, i * k + j, dtype, mask), _mm512_set1_ps(scale));
      if (offset) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, offset + j));
      v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(qmin - zero)), _mm512_set1_ps(qmax - zero));
      if (steps) {
        _mm512_mask_storeu_ps(steps + i * k + j, mask, v);
        continue;
      }
      __m512i code = _mm512_maskz_add_epi32(mask, _mm512_cvtps_epi32(v), _mm512_set1_epi32(shift));
      sum = _mm512_add_epi32(sum, code);
      _mm_mask_storeu_epi8(codes + i * k + j, mask, _mm512_cvtepi32_epi8(code));
    }
    if (!steps) zeros[i] = shift, sums[i] = _mm512_reduce_add_epi32(sum);
  }
}

// ---- Kronecker products ----------------------------------------------------------------------------------------------

// R rows of A B, from `row` on; A [.., k] with a stride, B [k, n], fp32, n whole vectors. `put` takes the result's.
template <int R, class Put>
static ALWAYS_INLINE void product(const float* a, int64_t stride, int64_t row, const float* b, int64_t k, int64_t n, const Put& put) {
  for (int64_t j = 0; j < n; j += 16) {
    __m512 acc[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t l = 0; l < k; l++) {
      __m512 v = _mm512_loadu_ps(b + l * n + j);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[(row + r) * stride + l]), v, acc[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) put(row + r, j, acc[r]);
  }
}

template <class Put>
static ALWAYS_INLINE void product(int64_t m, const float* a, int64_t stride, const float* b, int64_t k, int64_t n, const Put& put) {
  int64_t row = 0;
  for (; row + 8 <= m; row += 8) product<8>(a, stride, row, b, k, n, put);
  for (; row < m; row++) product<1>(a, stride, row, b, k, n, put);
}

// bf16 [m, k] as fp32 [m, padded].
static void widen(const uint16_t* from, int64_t m, int64_t k, int64_t padded, float* to) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < k; j += 16) _mm512_storeu_ps(to + i * padded + j, load16(from, i * k + j, BF16, lanes(k - j)));
}

// y = factor (L X) R for each of the rows X [n1, n2] of x, all bf16, and L X rounded to bf16 too.
extern "C" void plquant_kronecker(const uint16_t* x, const uint16_t* left, const uint16_t* right, float factor, uint16_t* y,
                                  int64_t rows, int64_t n1, int64_t n2, int32_t threads) {
  int64_t padded1 = round_up(n1, 16), padded = round_up(n2, 16);
  std::vector<float> l(n1 * padded1), r(n2 * padded);
  widen(left, n1, n1, padded1, l.data());
  widen(right, n2, n2, padded, r.data());
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
  {
    std::vector<float> whole(n1 * padded), half(n1 * padded);
#pragma omp for
    for (int64_t i = 0; i < rows; i++) {
      widen(x + i * n1 * n2, n1, n2, padded, whole.data());
      product(n1, l.data(), padded1, whole.data(), n1, padded, [&](int64_t row, int64_t j, __m512 v) {
        __m256i rounded = to_bf16(v);
        _mm512_storeu_ps(&half[row * padded + j], load16(&rounded, 0, BF16));
      });
      product(n1, half.data(), padded, r.data(), n2, padded, [&](int64_t row, int64_t j, __m512 v) {
        store16(y, (i * n1 + row) * n2 + j, BF16, _mm512_mul_ps(v, _mm512_set1_ps(factor)), lanes(n2 - j));
      });
    }
  }
}

extern "C" int32_t plquant_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
