// Products of many rows with AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// A unit of a weight's tile, as numbers, is an operand of one multiplication; so is, of codes, a pair of units:
//
//     bf16    row i of the operand has the inputs 2 i and 2 i + 1 of 16 outputs
//     int8    row i has the inputs 2 i, 2 i + 16, 2 i + 1, 2 i + 17 of 16 outputs; rows 8 and up those of the next unit
//
// Weights become bf16 as the reference rounds them, (code - zero_point) scale. Codes are multiplied as they are, unsigned
// with signed activations; the sums of codes and activations put zero-points right. Every code is decoded once for 512
// rows, into a cache, where the operands for 32 rows and 32 outputs at a time come from.

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "cpu.h"

static constexpr int64_t TILE_BYTES = 1024, MOST_ROWS = 512;
static constexpr int64_t MOST_PAIRS = 16;  // of tiles, whose sums are kept while inputs go by
static constexpr int64_t STEPS = 32;       // units, or pairs of units, decoded at a time

// Asks Linux for the registers, once for the process; 0: it has none.
extern "C" int32_t plquant_amx_start() {
  constexpr int request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

static void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// ---- operands --------------------------------------------------------------------------------------------------------

template <int B, int I>
static inline void numbers(const Weight& w, const __m512i* codes, int64_t at, __m512 scale, __m512 zero, char* out) {
  if constexpr (I < 16) {
    __m512i q = code<B, I>(codes), low = _mm512_set1_epi32((1 << B) - 1), pair = _mm512_setzero_si512();
    for (int p = 0; p < 2; p++) {
      if (w.along_out) {
        scale = load1(w.scale, at + 2 * I + p, w.scale_dtype);
        zero = _mm512_set1_ps(w.zero_point ? w.zero_point[at + 2 * I + p] : 1 << (B - 1));
      }
      __m512 v = _mm512_cvtepi32_ps(_mm512_and_si512(p ? _mm512_srli_epi32(q, 16) : q, low));
      __m512i half = _mm512_cvtepu16_epi32(to_bf16(_mm512_mul_ps(_mm512_sub_ps(v, zero), scale)));
      pair = p ? _mm512_or_si512(pair, _mm512_slli_epi32(half, 16)) : half;
    }
    _mm512_store_si512(out + 64 * I, pair);
    numbers<B, I + 1>(w, codes, at, scale, zero, out);
  }
}

template <int B, int I>
static inline void bytes(const __m512i* codes, __m512i& sum, char* out) {
  if constexpr (I < 8) {
    __m512i q = quad<B, I>(codes);
    sum = _mm512_dpbusd_epi32(sum, q, _mm512_set1_epi8(1));
    _mm512_store_si512(out + 64 * I, q);
    bytes<B, I + 1>(codes, sum, out);
  }
}

// The units from `begin` to `end` of a tile, each 1024 bytes of bf16, every other 1024.
template <int B>
static void numbers(const Weight& w, const Shape& s, int64_t tile, int64_t begin, int64_t end, char* out) {
  int64_t per_group = s.units / (w.along_out ? 1 : s.groups);
  const __m512i* codes = (const __m512i*)w.codes + tile * s.units * B;
  for (int64_t u = begin; u < end; u++, out += 2 * TILE_BYTES) {
    __m512 scale = _mm512_setzero_ps(), zero = scale;
    int64_t at = s.scales(tile, u / per_group);
    if (w.along_out) at = tile * 16 / s.padded_size * s.padded_k + u * 32;
    else scale = load16(w.scale, at, w.scale_dtype), zero = zero_points(w, at);
    numbers<B, 0>(w, codes + u * B, at, scale, zero, out);
  }
}

// The same in pairs of units, each 512 bytes of codes, and their sums.
template <int B>
static void bytes(const Weight& w, const Shape& s, int64_t tile, int64_t begin, int64_t end, char* out, int32_t* sums) {
  const __m512i* codes = (const __m512i*)w.codes + tile * s.units * B;
  __m512i sum = _mm512_loadu_si512(sums);
  for (int64_t u = begin; u < end; u++)
    bytes<B, 0>(codes + u * B, sum, out + (u - begin) / 2 * 2 * TILE_BYTES + (u - begin) % 2 * 512);
  if ((end - begin) % 2) memset(out + (end - begin) / 2 * 2 * TILE_BYTES + 512, 0, 512);
  _mm512_storeu_si512(sums, sum);
}

template <bool Int>
static void decode(const Weight& w, const Shape& s, int64_t tile, int64_t begin, int64_t end, char* out, int32_t* sums) {
  auto of = [&](auto bits) {
    if constexpr (Int) bytes<bits>(w, s, tile, begin, end, out, sums);
    else numbers<bits>(w, s, tile, begin, end, out);
  };
  switch (w.bits) {
    case 2: return of(std::integral_constant<int, 2>());
    case 3: return of(std::integral_constant<int, 3>());
    case 4: return of(std::integral_constant<int, 4>());
    case 5: return of(std::integral_constant<int, 5>());
    case 6: return of(std::integral_constant<int, 6>());
    case 7: return of(std::integral_constant<int, 7>());
    default: return of(std::integral_constant<int, 8>());
  }
}

// Rows [m, K] as operands [m / 32, steps, 2, 16, 64 bytes]; what is not there is zero.
template <bool Int>
static void arrange(const Weight& w, const Shape& s, const void* x, int64_t m, int64_t steps, char* out) {
  int64_t pieces = w.along_out ? 1 : s.groups, size = w.along_out ? w.in_features : s.size, units = s.units / pieces;
  for (int64_t i = 0; i < round_up(m, 32); i++) {
    char* row = out + (i / 32 * steps * 2 + i % 32 / 16) * TILE_BYTES + i % 16 * 64;
    for (int64_t u = 0; u < round_up(s.units, Int ? 2 : 1); u++) {
      int64_t left = u < s.units && i < m ? std::clamp<int64_t>(size - u % units * 32, 0, 32) : 0;
      int64_t at = i * w.in_features + u / units * size + u % units * 32;
      __mmask32 mask = left == 32 ? 0xffffffff : (1u << left) - 1;
      if constexpr (Int) {
        __m256i v = _mm256_maskz_loadu_epi8(mask, (const int8_t*)x + at);
        __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        char* place = row + u / 2 * 2 * TILE_BYTES + u % 2 * 32;
        _mm_store_si128((__m128i*)place, _mm_unpacklo_epi8(low, high));
        _mm_store_si128((__m128i*)place + 1, _mm_unpackhi_epi8(low, high));
      } else {
        _mm512_store_si512(row + u * 2 * TILE_BYTES, _mm512_maskz_loadu_epi16(mask, (const uint16_t*)x + at));
      }
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

// 32 rows times 32 outputs: sums, 4 tiles, of so many steps. The compiler does not know that tiles are memory.
template <bool Int>
static void multiply(const char* a, const char* b, int64_t steps, char* sums, bool first) {
  __asm__ volatile("" ::: "memory");
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + TILE_BYTES, 64);
    _tile_loadd(2, sums + 2 * TILE_BYTES, 64);
    _tile_loadd(3, sums + 3 * TILE_BYTES, 64);
  }
  for (int64_t i = 0; i < steps; i++, a += 2 * TILE_BYTES, b += 2 * TILE_BYTES) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + TILE_BYTES, 64);
    _tile_loadd(5, a + TILE_BYTES, 64);
    if constexpr (Int) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + TILE_BYTES, 64);
  _tile_stored(2, sums + 2 * TILE_BYTES, 64);
  _tile_stored(3, sums + 3 * TILE_BYTES, 64);
  __asm__ volatile("" ::: "memory");
}

struct Many {
  const void* x;
  const float* row_scale;     // null: 1
  const int32_t *zero, *sum;  // of rows of integers
  const void* bias;
  void* y;
  int32_t dtype;
};

template <bool Int>
static void finish(const Weight& w, const Shape& s, const Many& in, int64_t tile, const int32_t* w_sum, int64_t row,
                   int64_t m, const char* sums) {
  int64_t first = s.first(w, tile);
  __mmask16 mask = lanes(s.valid(w, tile));
  __m512 bias = in.bias ? load16(in.bias, first, in.dtype, mask) : _mm512_setzero_ps();
  for (int64_t i = 0; i < std::min<int64_t>(32, m - row); i++) {
    const char* at = sums + (i / 16 * 2) * TILE_BYTES + i % 16 * 64;
    __m512 v;
    if constexpr (Int) {  // exact, also where a part of it wraps around
      __m512i z = _mm512_cvtps_epi32(zero_points(w, tile * 16)), zx = _mm512_set1_epi32(in.zero[row + i]);
      __m512i rest = _mm512_set1_epi32(in.sum[row + i] - (int32_t)w.in_features * in.zero[row + i]);
      __m512i n = _mm512_sub_epi32(_mm512_load_si512(at), _mm512_mullo_epi32(zx, _mm512_loadu_si512(w_sum)));
      v = _mm512_cvtepi32_ps(_mm512_sub_epi32(n, _mm512_mullo_epi32(z, rest)));
      v = _mm512_mul_ps(v, load16(w.scale, tile * 16, w.scale_dtype));
    } else {
      v = _mm512_load_ps(at);
    }
    if (in.row_scale) v = _mm512_mul_ps(v, _mm512_set1_ps(in.row_scale[row + i]));
    store16(in.y, (row + i) * w.out_features + first, in.dtype, _mm512_add_ps(v, bias), mask);
  }
}

struct Buffer {
  char* data = nullptr;
  int64_t size = 0;
  char* of(int64_t bytes) {
    if (bytes > size) free(data), data = (char*)aligned_alloc(64, round_up(bytes, 64)), size = bytes;
    return data;
  }
  ~Buffer() { free(data); }
};

template <bool Int>
static void some_rows(const Weight& w, const Shape& s, const Many& in, int64_t m) {
  static thread_local Buffer arranged;
  constexpr int64_t units = Int ? 2 : 1;  // of a step
  int64_t steps = round_up(s.units, units) / units, pairs = (s.tiles + 1) / 2, blocks = (m + 31) / 32;
  char* a = arranged.of(blocks * steps * 2 * TILE_BYTES);
  arrange<Int>(w, s, in.x, m, steps, a);
  int64_t run = std::min(MOST_PAIRS, (pairs + w.threads - 1) / w.threads);
#pragma omp parallel for num_threads(w.threads) if (w.threads > 1)
  for (int64_t start = 0; start < pairs; start += run) {
    static thread_local Buffer buffer;
    char* b = buffer.of((2 * STEPS + run * blocks * 4) * TILE_BYTES);
    char* c = b + 2 * STEPS * TILE_BYTES;
    int64_t end = std::min(start + run, pairs);
    int32_t w_sums[MOST_PAIRS][2][16] = {};
    configure();
    for (int64_t step = 0; step < steps; step += STEPS) {
      int64_t count = std::min(STEPS, steps - step), last = std::min((step + count) * units, s.units);
      for (int64_t pair = start; pair < end; pair++) {
        for (int64_t t = 0; t < 2; t++)  // an odd last tile has itself beside it, which nobody reads
          decode<Int>(w, s, std::min(2 * pair + t, s.tiles - 1), step * units, last, b + t * TILE_BYTES,
                      w_sums[pair - start][t]);
        for (int64_t block = 0; block < blocks; block++)
          multiply<Int>(a + (block * steps + step) * 2 * TILE_BYTES, b, count,
                        c + ((pair - start) * blocks + block) * 4 * TILE_BYTES, step == 0);
      }
    }
    _tile_release();
    for (int64_t tile = 2 * start; tile < std::min(2 * end, s.tiles); tile++)
      for (int64_t block = 0; block < blocks; block++)
        finish<Int>(w, s, in, tile, w_sums[tile / 2 - start][tile % 2], block * 32, m,
                    c + ((tile / 2 - start) * blocks + block) * 4 * TILE_BYTES + tile % 2 * TILE_BYTES);
  }
}

// y [M, N] = x [M, K] W^T row_scale + bias. x is bf16, or int8 with the zero-points and sums of its rows if these are
// given, and one group along the input then.
extern "C" void plquant_many_rows(const Weight* weight, const void* x, int64_t m, const float* row_scale,
                                  const int32_t* zero, const int32_t* sum, const void* bias, void* y, int32_t dtype) {
  const Weight& w = *weight;
  Shape s(w);
  for (int64_t row = 0; row < m; row += MOST_ROWS) {
    Many in{(const char*)x + row * w.in_features * (zero ? 1 : 2), row_scale ? row_scale + row : nullptr,
            zero ? zero + row : nullptr, sum ? sum + row : nullptr, bias,
            (char*)y + row * w.out_features * (dtype == F32 ? 4 : 2), dtype};
    int64_t count = std::min(MOST_ROWS, m - row);
    if (zero) some_rows<true>(w, s, in, count);
    else some_rows<false>(w, s, in, count);
  }
}
