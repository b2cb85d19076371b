// Products with weights of 2 to 8 bits on a CPU with AVX512-BF16 or AVX2; cpu_layout.py says how the codes lie.
//
// A code is an integer below 257, which bf16 holds exactly, and so does fp32 the product with a bf16 activation. fp16
// and fp32 activations are split into 2 and 3 bf16 numbers whose sum they are (AVX2 multiplies in fp32, which holds them),
// so that nothing but the order of fp32 additions depends on the dtype. Scale and zero-point are applied to the sums of a
// group:
//
//     y[n] = sum_g scale[g, n] (sum_k x[k] code[n, k] - zero_point[g, n] sum_k x[k])         groups along the input
//     y[n] = sum_k (x[k] scale[g(n), k]) code[n, k] - sum_k (x[k] scale[g(n), k]) zero_point[g(n), k]       the output
//
// Letters: N outputs, K inputs, 16 outputs are a tile, 32 inputs a unit, P parts of an activation, R = M P rows.

#include "cpu.h"

// The zero-point of what codes are multiplied as.
static inline Floats raised(const Weight& w, Floats zero_point) {
  return raised(w.bits) ? zero_point + fill(raised(w.bits)) : zero_point;
}

// ---- few rows --------------------------------------------------------------------------------------------------------

// Activations as bf16 rows, two inputs of each side by side: values [sets, padded K / 2, R, 2], sums [sets, R, groups]; a
// set for each group of outputs.
struct Rows {
  int64_t count, sets, groups;
  std::vector<Pair> values;
  std::vector<float> sums;
};

static void split(const Weight& w, const Shape& s, const void* x, int dtype, int64_t m, int parts, Rows& rows) {
  int64_t pieces = w.along_out ? 1 : s.groups, size = w.along_out ? w.in_features : s.size;
  int64_t padded = w.along_out ? s.padded_k : s.padded_size;
#pragma omp parallel for num_threads(w.threads) if (rows.sets > 1 && w.threads > 1)
  for (int64_t set = 0; set < rows.sets; set++)
    for (int64_t i = 0; i < m; i++)
      for (int64_t g = 0; g < pieces; g++) {
        Floats sums[3] = {fill(0), fill(0), fill(0)};
        for (int64_t k = 0; k < size; k += 16) {
          Floats v = load16(x, i * w.in_features + g * size + k, dtype, lanes(size - k)), z = fill(1);
          if (w.along_out) {
            v = v * load16(w.scale, set * s.padded_k + k, w.scale_dtype);
            z = raised(w, zero_points(w, set * s.padded_k + k));
          }
          for (int p = 0; p < parts; p++) {
            Pair pairs[8], *to = rows.values.data() + (set * s.padded_k + g * padded + k) / 2 * rows.count;
            Floats part = to_pairs(v, pairs);
            for (int64_t j = 0; j < 8; j++) to[j * rows.count + i * parts + p] = pairs[j];
            sums[p] = fma(part, z, sums[p]);
            v = v - part;
          }
        }
        for (int p = 0; p < parts; p++)
          rows.sums[(set * rows.count + i * parts + p) * pieces + g] = sum(sums[p]);
      }
}

template <int B, int R, int E>
struct Step {
  Decoder<B> decoder;
  template <int I>
  ALWAYS_INLINE void one(const Words* z, const Pair* x, Floats (&acc)[R][E]) const {
    if constexpr (I < 16) {
      Numbers w = decoder.numbers(code<B, I>(z));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][I % E] = dot(acc[r][I % E], w, x[I * R + r]);
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
  constexpr int E = std::max(1, CHAINS / R);
  Step<B, R, E> step;
  int64_t set = w.along_out ? tile * 16 / s.padded_size : 0, groups = w.along_out ? 1 : s.groups;
  int64_t units = s.units / groups;
  const Pair* x = rows.values.data() + set * s.padded_k / 2 * R;
  const float* sums = rows.sums.data() + set * rows.count * groups;
  const Words* codes = (const Words*)w.codes + tile * s.units * B;
  Floats total[T][R];
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[t][r] = fill(0);
  for (int64_t g = 0; g < groups; g++) {
    Floats acc[T][R][E];
    for (int t = 0; t < T; t++)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        for (int e = 0; e < E; e++) acc[t][r][e] = fill(0);
    for (int64_t u = g * units; u < (g + 1) * units; u++) {
      int64_t ahead = ahead_of<B, T>(s, u);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const Words* z = codes + (t * s.units + u) * B;
        for (int b = 0; b < B; b++) _mm_prefetch((const char*)(z + ahead + b), _MM_HINT_T0);
        step.template one<0>(z, x + u * 16 * R, acc[t]);
      }
    }
    for (int t = 0; t < T; t++) {
      int64_t at = s.scales(tile + t, g);
      Floats scale = w.along_out ? fill(1) : load16(w.scale, at, w.scale_dtype);
      Floats zero = w.along_out ? fill(1) : raised(w, zero_points(w, at));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        Floats a = acc[t][r][0];
        for (int e = 1; e < E; e++) a = a + acc[t][r][e];
        a = fnma(zero, fill(sums[r * groups + g]), a);
        total[t][r] = fma(scale, a, total[t][r]);
      }
    }
  }
  for (int t = 0; t < T; t++) {
    int64_t first = s.first(w, tile + t);
    Mask mask = lanes(s.valid(w, tile + t));
    Floats bias = out.bias ? load16(out.bias, first, out.dtype, mask) : fill(0);
    for (int64_t m = 0; m < out.m; m++) {
      Floats v = fill(0);
      for (int p = 0; p < out.parts; p++) v = v + total[t][m * out.parts + p];
      if (out.row_scale) v = v * fill(out.row_scale[m]);
      store16(out.y, m * w.out_features + first, out.dtype, v + bias, mask);
    }
  }
}

template <int B, int R>
static void all_tiles(const Weight& w, const Shape& s, const Rows& rows, const Output& out) {
  constexpr int T = R >= 8 ? 1 : TILES;
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
    case 8: return all_tiles<B, std::min(8, PASS)>(w, s, rows, out);
    default: return all_tiles<B, PASS>(w, s, rows, out);
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
  rows.values.assign(rows.sets * rows.count * s.padded_k / 2, Pair());
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
  int64_t step = PASS / parts, x_bytes = w.in_features * size_of(x_dtype), y_bytes = w.out_features * size_of(y_dtype);
  for (int64_t i = 0; i < m; i += step)
    one_pass(w, s, (const char*)x + i * x_bytes, x_dtype, parts, std::min(step, m - i), row_scale ? row_scale + i : nullptr,
             bias, (char*)y + i * y_bytes, y_dtype);
}

// ---- rows of integers ------------------------------------------------------------------------------------------------

// Adds the products of a unit's codes with R rows, times F, and the codes themselves.
template <int B, int R, int F = 1>
struct Quads {
  template <int I>
  static ALWAYS_INLINE void one(const Words* z, const int32_t* x, ByteSums (&acc)[R], ByteSums& sum) {
    if constexpr (B > MOST_BITS) {  // 8 bits, which lie as twice 4
      Quads<4, R>::template one<I>(z, x, acc, sum);
      Quads<4, R, 16>::template one<I>(z + 4, x, acc, sum);
    } else if constexpr (I < 8) {
      Words q = quad<B, I>(z);
      sum.add<B, I, F>(q, fill8(1));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r].template add<B, I, F>(q, fill32(x[I * R + r]));
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
      Half sum = _mm256_setzero_si256();
      for (int64_t k = 0; k < s.size; k += 32) {
        Half v = load_bytes(x + i * w.in_features + g * s.size + k, s.size - k);
        sum = add_bytes(sum, v);
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
  const Words* codes = (const Words*)w.codes + tile * s.units * B;
  Floats total[T][R];
  for (int t = 0; t < T; t++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[t][r] = fill(0);
  for (int64_t g = 0; g < s.groups; g++) {
    ByteSums acc[T][R], sum[T];
    for (int t = 0; t < T; t++) {
      sum[t].total = fill32(0);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[t][r].total = fill32(0);
    }
    for (int64_t u = g * units; u < (g + 1) * units; u++) {
      int64_t ahead = ahead_of<B, T>(s, u);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const Words* z = codes + (t * s.units + u) * B;
        for (int b = 0; b < B; b++) _mm_prefetch((const char*)(z + ahead + b), _MM_HINT_T0);
        Quads<B, R>::template one<0>(z, in.values + u * 8 * R, acc[t], sum[t]);
      }
    }
    for (int t = 0; t < T; t++) {
      int64_t at = s.scales(tile + t, g);
      Floats scale = load16(w.scale, at, w.scale_dtype);
      Words zero = to_words(zero_points(w, at));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {  // exact, also where a part of it wraps around
        Words rest = fill32(in.sum[r * s.groups + g] - (int32_t)s.size * in.zero[r]);
        Words n = sub32(acc[t][r].total, mul32(fill32(in.zero[r]), sum[t].total));
        n = sub32(n, mul32(zero, rest));
        total[t][r] = fma(scale, to_floats(n), total[t][r]);
      }
    }
  }
  for (int t = 0; t < T; t++) {
    int64_t first = s.first(w, tile + t);
    Mask mask = lanes(s.valid(w, tile + t));
    Floats bias = in.bias ? load16(in.bias, first, in.dtype, mask) : fill(0);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      if (r < in.m)
        store16(in.y, r * w.out_features + first, in.dtype,
                total[t][r] * fill(in.scale[r]) + bias, mask);
  }
}

template <int B, int R>
static void all_integer_tiles(const Weight& w, const Shape& s, const Integers& in) {
  constexpr int T = R >= 16 ? 1 : TILES;
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
  return all_integer_tiles<B, PASS>(w, s, in);
}

static void some_integer_rows(const Weight& w, const Shape& s, const int8_t* x, int64_t m, const float* scale,
                              const int32_t* zero, const void* bias, char* y, int32_t dtype) {
  int64_t block = m == 1 ? 1 : m <= 4 ? 4 : PASS, rows = round_up(m, block);
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
    Mask valid = lanes(n - first);
    alignas(64) float found[R][16] = {};
    for (int64_t i = first; i < std::min(first + 16, n); i++) {
      Floats acc[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r] = fill(0);
      for (int64_t j = 0; j < k; j += 32) {
        Words v = load_bf16(w + i * k + j, k - j);
        _mm_prefetch((const char*)(w + i * k + j) + 4096, _MM_HINT_T0);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[r] = dot_bf16(acc[r], v, load_bf16(x + r * k + j, k - j));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) found[r][i - first] = sum(acc[r]);
    }
    Floats add = bias ? load16(bias, first, BF16, valid) : fill(0);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) store16(y, r * n + first, BF16, load(found[r]) + add, valid);
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
  const Words* codes;
  char* out;
  int64_t row_bytes, at, inputs;
  Mask mask;

  template <int I>
  ALWAYS_INLINE void put(Floats scale, Floats zero) const {
    if constexpr (I < 16) {
      Words q = code<B, I>(codes), low = fill32((1 << B) - 1), both[2] = {q & low, shift32<16>(q) & low};
      for (int p = 0; p < 2; p++) {
        int k = 2 * I + p;
        if (!Whole && k >= inputs) return;
        if (w.along_out) {
          scale = load1(w.scale, at + k, w.scale_dtype);
          zero = fill(w.zero_point ? w.zero_point[at + k] : 1 << (B - 1));
        }
        Floats v = (to_floats(both[p]) - zero) * scale;
        store16(out + k * row_bytes, 0, D, v, Whole ? ALL : mask);
      }
      put<I + 1>(scale, zero);
    }
  }
};

template <int B, int D>
static void spread(const Weight& w, const Shape& s, int64_t tile, int64_t column, int64_t columns, char* out) {
  int64_t size = size_of(D), group = w.along_out ? tile * 16 / s.padded_size : 0;
  int64_t groups = w.along_out ? 1 : s.groups, units = s.units / groups, width = w.along_out ? w.in_features : s.size;
  Mask mask = lanes(s.valid(w, tile));
  const Words* codes = (const Words*)w.codes + tile * s.units * B;
  for (int64_t g = 0; g < groups; g++) {
    Floats scale = fill(0), zero = scale;
    int64_t at = s.scales(tile, g);
    if (!w.along_out) scale = load16(w.scale, at, w.scale_dtype), zero = zero_points(w, at);
    for (int64_t u = 0; u < units; u++) {
      char* first = out + ((g * width + u * 32) * columns + column) * size;
      const Words* z = codes + (g * units + u) * B;
      int64_t place = group * s.padded_k + u * 32, inputs = width - u * 32;
      if (mask == ALL && inputs >= 32) Unit<B, D, true>{w, z, first, columns * size, place, inputs, mask}.template put<0>(scale, zero);
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
    Floats low = fill(0), high = low;
    uint32_t nan = 0;  // which a minimum may lose
    for (int64_t j = 0; j < k; j += 16) {
      Floats v = load16(x, i * k + j, dtype, lanes(k - j));
      nan |= nans(v);
      low = min(low, v), high = max(high, v);
    }
    float lo = least(low), hi = most(high), zero = 0;
    if (clip) lo *= clip[0], hi *= clip[1];
    float scale = symmetric ? std::max(hi / qmax, lo / qmin) : (hi - lo) / (qmax - qmin);
    scale = std::max(scale, 1.17549435e-38f);
    if (!symmetric) zero = std::min(std::max(std::nearbyint(-lo / scale), qmin), qmax);
    scales[i] = nan ? NAN : scale;
    int32_t middle = symmetric ? 0 : 1 << (bits - 1), shift = (int32_t)zero - middle;
    Words sum = fill32(0);
    for (int64_t j = 0; j < k; j += 16) {
      Mask mask = lanes(k - j);
      Floats v = load16(x, i * k + j, dtype, mask) / fill(scale);
      if (offset) v = v + load(offset + j, mask);
      v = min(max(rounded(v), fill(qmin - zero)), fill(qmax - zero));
      if (steps) {
        store(steps + i * k + j, v, mask);
        continue;
      }
      Words code = keep32(add32(to_words(v), fill32(shift)), mask);
      sum = add32(sum, code);
      store_bytes(codes + i * k + j, code, mask);
    }
    if (!steps) zeros[i] = shift, sums[i] = sum32(sum);
  }
}

// ---- Kronecker products ----------------------------------------------------------------------------------------------

// R rows of A B, from `row` on; A [.., k] with a stride, B [k, n], fp32, n whole vectors. `put` takes the result's.
template <int R, class Put>
static ALWAYS_INLINE void product(const float* a, int64_t stride, int64_t row, const float* b, int64_t k, int64_t n, const Put& put) {
  for (int64_t j = 0; j < n; j += 16) {
    Floats acc[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r] = fill(0);
    for (int64_t l = 0; l < k; l++) {
      Floats v = load(b + l * n + j);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r] = fma(fill(a[(row + r) * stride + l]), v, acc[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) put(row + r, j, acc[r]);
  }
}

template <class Put>
static ALWAYS_INLINE void product(int64_t m, const float* a, int64_t stride, const float* b, int64_t k, int64_t n, const Put& put) {
  constexpr int R = std::min(8, PASS);
  int64_t row = 0;
  for (; row + R <= m; row += R) product<R>(a, stride, row, b, k, n, put);
  for (; row < m; row++) product<1>(a, stride, row, b, k, n, put);
}

// bf16 [m, k] as fp32 [m, padded].
static void widen(const uint16_t* from, int64_t m, int64_t k, int64_t padded, float* to) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < k; j += 16) store(to + i * padded + j, load16(from, i * k + j, BF16, lanes(k - j)));
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
      product(n1, l.data(), padded1, whole.data(), n1, padded, [&](int64_t row, int64_t j, Floats v) {
        store(&half[row * padded + j], from_bf16(to_bf16(v)));
      });
      product(n1, half.data(), padded, r.data(), n2, padded, [&](int64_t row, int64_t j, Floats v) {
        store16(y, (i * n1 + row) * n2 + j, BF16, v * fill(factor), lanes(n2 - j));
      });
    }
  }
}
