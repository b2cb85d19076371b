// What the CPU kernels share: how a weight lies (cpu_layout.py says it), and the codes in it.
//
// Letters: N outputs, K inputs, 16 outputs are a tile, 32 inputs a unit.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// What loops over registers must be a part of: else they are in memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };

static inline int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

// The same struct in native.py.
struct Weight {
  const int16_t* codes;       // [tiles, units, bits, 32]
  const void* scale;          // [tiles, groups, 16] or [groups, padded K]
  const uint8_t* zero_point;  // as scale; null: 2^(bits - 1)
  int64_t out_features, in_features, group_size;
  int32_t bits, along_out, scale_dtype, threads;
};

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where things lie once groups are padded to whole tiles or units.
struct Shape {
  int64_t groups, size, padded_size, tiles, units, padded_k;
  explicit Shape(const Weight& w) {
    size = w.group_size;
    groups = (w.along_out ? w.out_features : w.in_features) / size;
    padded_size = round_up(size, w.along_out ? 16 : 32);
    tiles = w.along_out ? groups * padded_size / 16 : round_up(w.out_features, 16) / 16;
    padded_k = w.along_out ? round_up(w.in_features, 32) : groups * padded_size;
    units = padded_k / 32;
  }
  // First output of a tile and how many of its 16 are outputs.
  int64_t first(const Weight& w, int64_t tile) const {
    if (!w.along_out) return tile * 16;
    int64_t per_group = padded_size / 16;
    return tile / per_group * size + tile % per_group * 16;
  }
  int64_t valid(const Weight& w, int64_t tile) const {
    int64_t left = w.along_out ? size - tile % (padded_size / 16) * 16 : w.out_features - tile * 16;
    return std::min<int64_t>(16, left);
  }
  // Where the scales of a tile are in a group along the input.
  int64_t scales(int64_t tile, int64_t group) const { return (tile * groups + group) * 16; }
};

static inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

static inline __m512 load16(const void* p, int64_t i, int dtype, __mmask16 mask = 0xffff) {
  if (dtype == F32) return _mm512_maskz_loadu_ps(mask, (const float*)p + i);
  __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)p + i);
  if (dtype == F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m256i to_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

static inline void store16(void* p, int64_t i, int dtype, __m512 v, __mmask16 mask = 0xffff) {
  if (dtype == F32) return _mm512_mask_storeu_ps((float*)p + i, mask, v);
  __m256i half = dtype == BF16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16((uint16_t*)p + i, mask, half);
}

static inline __m512 zero_points(const Weight& w, int64_t i) {
  if (!w.zero_point) return _mm512_set1_ps((float)(1 << (w.bits - 1)));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zero_point + i))));
}

// ---- codes -----------------------------------------------------------------------------------------------------------

template <int S>
static inline __m512i shift16(__m512i v) {
  if constexpr (S >= 0) return _mm512_srli_epi16(v, S);
  return _mm512_slli_epi16(v, -S);
}

// Codes of the I-th pair of inputs in a unit, in the low bits of 16-bit lanes; what is above them is arbitrary.
template <int B, int I>
static ALWAYS_INLINE __m512i code(const __m512i* z) {
  constexpr int fours = B == 8 ? 8 : B >= 4 ? 4 : 0, twos = (B & 2) && B != 8 ? 2 : 0;
  __m512i q = B >= 4 ? shift16<4 * (I % 4)>(_mm512_loadu_si512(z + I / 4)) : _mm512_setzero_si512();
  if constexpr (twos && !fours) q = shift16<2 * (I % 8)>(_mm512_loadu_si512(z + I / 8));
  if constexpr (twos && fours) {
    __m512i t = shift16<2 * (I % 8) - 4>(_mm512_loadu_si512(z + fours + I / 8));
    q = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x30), t, q, 0xca);
  }
  if constexpr (B == 8) {
    __m512i t = shift16<4 * (I % 4) - 4>(_mm512_loadu_si512(z + 4 + I / 4));
    q = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0xf0), t, q, 0xca);
  } else if constexpr (B & 1) {
    __m512i t = shift16<I - (B - 1)>(_mm512_loadu_si512(z + fours + twos));
    q = _mm512_ternarylogic_epi32(_mm512_set1_epi16(1 << (B - 1)), t, q, 0xca);
  }
  return q;
}

// Codes of the inputs 2 I, 2 I + 16, 2 I + 1, 2 I + 17 in a unit, as bytes; I from 0 to 7.
template <int B, int I>
static ALWAYS_INLINE __m512i quad(const __m512i* z) {
  __m512i low = _mm512_set1_epi16((1 << B) - 1), high = _mm512_slli_epi16(low, 8);
  __m512i q = _mm512_and_si512(code<B, I>(z), low);
  return _mm512_ternarylogic_epi32(q, _mm512_slli_epi16(code<B, I + 8>(z), 8), high, 0xf8);  // q | (next & high)
}
