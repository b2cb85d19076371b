// Vectors of 64 bytes, and what the CPU kernels do with them: with AVX512-BF16 and VNNI each is one register, with AVX2,
// FMA and F16C two.
//
//     Floats    16 of fp32; + - * /
//     Words     16 integers of 32 bits, 32 of 16 or 64 of 8, as the name of a function says; & |
//     Half      16 of bf16 or fp16, or 32 bytes
//     Mask      the first lanes of 16; what others have in memory is neither read nor written, and reads as 0
//     Numbers   codes as they are multiplied: of two inputs, for 16 outputs
//     Pair      two activations as they are multiplied

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// What loops over registers must be a part of: else they are in memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

using Half = __m256i;

#ifdef __AVX512BF16__

using Floats = __m512;
using Words = __m512i;
using Mask = __mmask16;
using Numbers = Words;  // bf16
using Pair = int32_t;   // bf16

static constexpr Mask ALL = 0xffff;
static constexpr int PASS = 16;   // rows whose sums fit the registers
static constexpr int CHAINS = 2;  // of sums that a product of few rows needs, so that none waits for the one before
static constexpr int TILES = 4;   // of a weight that few rows meet side by side

static ALWAYS_INLINE Mask lanes(int64_t n) { return n >= 16 ? ALL : (Mask)((1u << n) - 1); }
static ALWAYS_INLINE __mmask32 lanes32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

static ALWAYS_INLINE Floats fill(float x) { return _mm512_set1_ps(x); }
static ALWAYS_INLINE Floats load(const float* p, Mask mask = ALL) { return _mm512_maskz_loadu_ps(mask, p); }
static ALWAYS_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
static ALWAYS_INLINE void store(float* p, Floats v, Mask mask) { _mm512_mask_storeu_ps(p, mask, v); }
static ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static ALWAYS_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
static ALWAYS_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static ALWAYS_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static ALWAYS_INLINE Floats rounded(Floats v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static ALWAYS_INLINE uint32_t nans(Floats v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
static ALWAYS_INLINE float sum(Floats v) { return _mm512_reduce_add_ps(v); }
static ALWAYS_INLINE float least(Floats v) { return _mm512_reduce_min_ps(v); }
static ALWAYS_INLINE float most(Floats v) { return _mm512_reduce_max_ps(v); }

static ALWAYS_INLINE Words fill8(int x) { return _mm512_set1_epi8(x); }
static ALWAYS_INLINE Words fill16(int x) { return _mm512_set1_epi16(x); }
static ALWAYS_INLINE Words fill32(int x) { return _mm512_set1_epi32(x); }
static ALWAYS_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
static ALWAYS_INLINE Words from_bytes(__m128i v) { return _mm512_cvtepu8_epi32(v); }
static ALWAYS_INLINE Words add32(Words a, Words b) { return _mm512_add_epi32(a, b); }
static ALWAYS_INLINE Words sub32(Words a, Words b) { return _mm512_sub_epi32(a, b); }
static ALWAYS_INLINE Words mul32(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
static ALWAYS_INLINE int32_t sum32(Words v) { return _mm512_reduce_add_epi32(v); }
static ALWAYS_INLINE Words keep32(Words v, Mask mask) { return _mm512_maskz_mov_epi32(mask, v); }
static ALWAYS_INLINE Floats to_floats(Words v) { return _mm512_cvtepi32_ps(v); }
static ALWAYS_INLINE Words to_words(Floats v) { return _mm512_cvtps_epi32(v); }
template <int S>  // to the right; below 0 to the left
static ALWAYS_INLINE Words shift16(Words v) {
  if constexpr (S >= 0) return _mm512_srli_epi16(v, S);
  else return _mm512_slli_epi16(v, -S);
}
template <int S>
static ALWAYS_INLINE Words shift32(Words v) { return _mm512_srli_epi32(v, S); }
// The first bits of codes, and more of them beside those. Here other bits stay, which `only` clears.
static ALWAYS_INLINE Words plane(Words v, int) { return v; }
static ALWAYS_INLINE Words plane(Words v, int bits, Words q) { return _mm512_ternarylogic_epi32(fill16(bits), v, q, 0xca); }
static ALWAYS_INLINE Words only(Words q, Words bits) { return q & bits; }
// Codes in `bits` beside others.
static ALWAYS_INLINE Words beside(Words q, Words next, Words bits) {
  return _mm512_ternarylogic_epi32(q, next, bits, 0xf8);  // q | (next & bits)
}

static ALWAYS_INLINE Half load_half(const void* p, Mask mask) { return _mm256_maskz_loadu_epi16(mask, p); }
static ALWAYS_INLINE void store_half(void* p, Half v, Mask mask) { _mm256_mask_storeu_epi16(p, mask, v); }
static ALWAYS_INLINE Half to_bf16(Floats v) { return (Half)_mm512_cvtneps_pbh(v); }
static ALWAYS_INLINE Floats from_bf16(Half v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
static ALWAYS_INLINE Half to_f16(Floats v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static ALWAYS_INLINE Floats from_f16(Half v) { return _mm512_cvtph_ps(v); }

// The first n of 32 bf16 numbers, or bytes; 0 elsewhere.
static ALWAYS_INLINE Words load_bf16(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(lanes32(n), p); }
static ALWAYS_INLINE Half load_bytes(const int8_t* p, int64_t n) { return _mm256_maskz_loadu_epi8(lanes32(n), p); }
// Integers of 32 bits that fit 8.
static ALWAYS_INLINE void store_bytes(int8_t* p, Words v, Mask mask) {
  _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(v));
}

// Every lane of 32 bits: the sum and 2 products of bf16.
static ALWAYS_INLINE Floats dot_bf16(Floats sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// Sums of 4 products of bytes in every lane of 32 bits. Adds those of a unit, I from 0 to 7, of unsigned a of B bits with
// signed b, F times.
static constexpr int MOST_BITS = 8;
struct ByteSums {
  Words total;
  template <int B, int I, int F>
  ALWAYS_INLINE void add(Words a, Words b) { total = _mm512_dpbusd_epi32(total, a, b); }
};
// The sum and 4 signed bytes.
static ALWAYS_INLINE Half add_bytes(Half sum, Half v) { return _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), v); }

// Codes, in the low bits of 16-bit lanes, to numbers: themselves, or more by what `raised` says.
template <int B>
struct Decoder {
  Words table;
  Decoder() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) {
      float value = (float)(i & ((1 << (B < 5 ? B : 5)) - 1));
      uint32_t word;
      memcpy(&word, &value, 4);
      values[i] = word >> 16;
    }
    table = _mm512_load_si512(values);
  }
  ALWAYS_INLINE Numbers numbers(Words q) const {
    if constexpr (B <= 5) return _mm512_permutexvar_epi16(q, table);
    else if constexpr (B <= 7)  // 128 + code, as a bit pattern
      return _mm512_ternarylogic_epi32(q, fill16((1 << B) - 1), fill16(0x4300), 0xea);
    else {  // an integer below 256 has nothing in the lower half of its fp32
      Words low = q & fill32(255), next = _mm512_srli_epi32(_mm512_slli_epi32(q, 8), 24);
      low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(low)), 16);
      return low | _mm512_castps_si512(_mm512_cvtepi32_ps(next));
    }
  }
};

static inline float raised(int bits) { return bits == 6 || bits == 7 ? 128 : 0; }

// 16 activations, rounded as the result says, as 8 pairs.
static ALWAYS_INLINE Floats to_pairs(Floats v, Pair (&pairs)[8]) {
  Half half = to_bf16(v);
  _mm256_storeu_si256((__m256i*)pairs, half);
  return from_bf16(half);
}
static ALWAYS_INLINE Floats dot(Floats sum, Numbers codes, Pair x) { return dot_bf16(sum, codes, fill32(x)); }

#else

struct Floats {
  __m256 lo, hi;
};
struct Words {
  __m256i lo, hi;
};
using Mask = int64_t;  // how many
struct Numbers {
  Floats even, odd;
};
struct Pair {
  float even, odd;
};

static constexpr Mask ALL = 16;
static constexpr int PASS = 4, CHAINS = 4, TILES = 1;

static ALWAYS_INLINE Mask lanes(int64_t n) { return n >= 16 ? ALL : n; }
static ALWAYS_INLINE __m256i lanes8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static ALWAYS_INLINE Half load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
// So many bytes, no more than 32; 0 elsewhere.
static ALWAYS_INLINE Half load_some(const void* p, int64_t bytes) {
  alignas(32) char copy[32] = {};
  memcpy(copy, p, bytes);
  return load_256(copy);
}
// 16 integers of 32 bits that fit 16, whose halves packing has mixed, in order.
static ALWAYS_INLINE Half in_order(__m256i v) { return _mm256_permute4x64_epi64(v, 0xd8); }
static ALWAYS_INLINE __m128i low(__m256i v) { return _mm256_castsi256_si128(v); }
static ALWAYS_INLINE __m128i high(__m256i v) { return _mm256_extracti128_si256(v, 1); }

static ALWAYS_INLINE Floats operator+(Floats a, Floats b) { return {a.lo + b.lo, a.hi + b.hi}; }
static ALWAYS_INLINE Floats operator-(Floats a, Floats b) { return {a.lo - b.lo, a.hi - b.hi}; }
static ALWAYS_INLINE Floats operator*(Floats a, Floats b) { return {a.lo * b.lo, a.hi * b.hi}; }
static ALWAYS_INLINE Floats operator/(Floats a, Floats b) { return {a.lo / b.lo, a.hi / b.hi}; }
static ALWAYS_INLINE Words operator&(Words a, Words b) { return {a.lo & b.lo, a.hi & b.hi}; }
static ALWAYS_INLINE Words operator|(Words a, Words b) { return {a.lo | b.lo, a.hi | b.hi}; }

static ALWAYS_INLINE Floats fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static ALWAYS_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static ALWAYS_INLINE Floats load(const float* p, Mask mask) {
  if (mask == ALL) return load(p);
  return {_mm256_maskload_ps(p, lanes8(mask)), _mm256_maskload_ps(p + 8, lanes8(mask - 8))};
}
static ALWAYS_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
static ALWAYS_INLINE void store(float* p, Floats v, Mask mask) {
  if (mask == ALL) return store(p, v);
  _mm256_maskstore_ps(p, lanes8(mask), v.lo), _mm256_maskstore_ps(p + 8, lanes8(mask - 8), v.hi);
}
static ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static ALWAYS_INLINE Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
static ALWAYS_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static ALWAYS_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static ALWAYS_INLINE Floats rounded(Floats v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, nearest), _mm256_round_ps(v.hi, nearest)};
}
static ALWAYS_INLINE __m256 nans(__m256 v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
static ALWAYS_INLINE uint32_t nans(Floats v) { return _mm256_movemask_ps(_mm256_or_ps(nans(v.lo), nans(v.hi))); }
template <class Of>
static ALWAYS_INLINE float reduced(__m256 v, Of of) {
  __m128 four = of(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)), two = of(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(of(two, _mm_movehdup_ps(two)));
}
static ALWAYS_INLINE float sum(Floats v) {
  return reduced(v.lo + v.hi, [](__m128 a, __m128 b) { return a + b; });
}
static ALWAYS_INLINE float least(Floats v) {
  return reduced(_mm256_min_ps(v.lo, v.hi), [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
}
static ALWAYS_INLINE float most(Floats v) {
  return reduced(_mm256_max_ps(v.lo, v.hi), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

static ALWAYS_INLINE Words fill8(int x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
static ALWAYS_INLINE Words fill16(int x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
static ALWAYS_INLINE Words fill32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static ALWAYS_INLINE Words load_words(const void* p) { return {load_256(p), load_256((const char*)p + 32)}; }
static ALWAYS_INLINE Words from_bytes(__m128i v) {
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
static ALWAYS_INLINE Words add32(Words a, Words b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
static ALWAYS_INLINE Words sub32(Words a, Words b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
static ALWAYS_INLINE Words mul32(Words a, Words b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
static ALWAYS_INLINE int32_t sum32(Words v) {
  __m256i eight = _mm256_add_epi32(v.lo, v.hi);
  __m128i four = _mm_add_epi32(low(eight), high(eight)), two = _mm_add_epi32(four, _mm_srli_si128(four, 8));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
static ALWAYS_INLINE Words keep32(Words v, Mask mask) { return {v.lo & lanes8(mask), v.hi & lanes8(mask - 8)}; }
static ALWAYS_INLINE Floats to_floats(Words v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
static ALWAYS_INLINE Words to_words(Floats v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
template <int S>
static ALWAYS_INLINE Words shift16(Words v) {
  if constexpr (S >= 0) return {_mm256_srli_epi16(v.lo, S), _mm256_srli_epi16(v.hi, S)};
  else return {_mm256_slli_epi16(v.lo, -S), _mm256_slli_epi16(v.hi, -S)};
}
template <int S>
static ALWAYS_INLINE Words shift32(Words v) { return {_mm256_srli_epi32(v.lo, S), _mm256_srli_epi32(v.hi, S)}; }
static ALWAYS_INLINE Words plane(Words v, int bits) { return v & fill16(bits); }
static ALWAYS_INLINE Words plane(Words v, int bits, Words q) { return q | (v & fill16(bits)); }
static ALWAYS_INLINE Words only(Words q, Words) { return q; }
static ALWAYS_INLINE Words beside(Words q, Words next, Words) { return q | next; }

static ALWAYS_INLINE Half load_half(const void* p, Mask mask) { return mask == ALL ? load_256(p) : load_some(p, 2 * mask); }
static ALWAYS_INLINE void store_half(void* p, Half v, Mask mask) {
  if (mask == ALL) _mm256_storeu_si256((__m256i*)p, v);
  else memcpy(p, &v, 2 * mask);
}
static ALWAYS_INLINE __m256i upper16(__m256 v) {  // rounded to bf16, in the lower half of every lane
  __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
  __m256i odd = upper & _mm256_set1_epi32(1), quiet = upper | _mm256_set1_epi32(0x40);
  __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, _mm256_castps_si256(nans(v)));
}
static ALWAYS_INLINE Half to_bf16(Floats v) { return in_order(_mm256_packus_epi32(upper16(v.lo), upper16(v.hi))); }
static ALWAYS_INLINE __m256 from_bf16(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
static ALWAYS_INLINE Floats from_bf16(Half v) { return {from_bf16(low(v)), from_bf16(high(v))}; }
static ALWAYS_INLINE Half to_f16(Floats v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(v.hi, nearest), _mm256_cvtps_ph(v.lo, nearest));
}
static ALWAYS_INLINE Floats from_f16(Half v) { return {_mm256_cvtph_ps(low(v)), _mm256_cvtph_ps(high(v))}; }

static ALWAYS_INLINE Words load_bf16(const uint16_t* p, int64_t n) {
  if (n >= 32) return load_words(p);
  return {load_half(p, lanes(n)), load_half(p + 16, lanes(n > 16 ? n - 16 : 0))};
}
static ALWAYS_INLINE Half load_bytes(const int8_t* p, int64_t n) { return n >= 32 ? load_256(p) : load_some(p, n); }
static ALWAYS_INLINE void store_bytes(int8_t* p, Words v, Mask mask) {
  __m256i halves = in_order(_mm256_packs_epi32(v.lo, v.hi));
  __m128i bytes = _mm_packs_epi16(low(halves), high(halves));
  if (mask == ALL) _mm_storeu_si128((__m128i*)p, bytes);
  else memcpy(p, &bytes, mask);
}

static ALWAYS_INLINE __m256 dot_bf16(__m256 sum, __m256i a, __m256i b) {
  __m256i upper = _mm256_set1_epi32(0xffff0000);
  sum = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(a, 16), (__m256)_mm256_slli_epi32(b, 16), sum);
  return _mm256_fmadd_ps((__m256)(a & upper), (__m256)(b & upper), sum);
}
static ALWAYS_INLINE Floats dot_bf16(Floats sum, Words a, Words b) {
  return {dot_bf16(sum.lo, a.lo, b.lo), dot_bf16(sum.hi, a.hi, b.hi)};
}
static constexpr int MOST_BITS = 7;  // of which two products fit 16 bits
struct ByteSums {
  Words total, part;  // the latter 16 bits, as many products as fit
  template <int B, int I, int F>
  ALWAYS_INLINE void add(Words a, Words b) {
    constexpr int fit = 32767 / 256 / ((1 << B) - 1), turn = I % (fit < 8 ? fit : 8);
    Words two{_mm256_maddubs_epi16(a.lo, b.lo), _mm256_maddubs_epi16(a.hi, b.hi)};
    part = turn ? Words{_mm256_add_epi16(part.lo, two.lo), _mm256_add_epi16(part.hi, two.hi)} : two;
    if (turn != fit - 1 && I != 7) return;
    __m256i factor = _mm256_set1_epi16(F);
    total = add32(total, {_mm256_madd_epi16(part.lo, factor), _mm256_madd_epi16(part.hi, factor)});
  }
};
static ALWAYS_INLINE Half add_bytes(Half sum, Half v) {
  __m256i two = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}

template <int B>
struct Decoder {
  ALWAYS_INLINE Numbers numbers(Words q) const {
    return {to_floats(q & fill32(255)), to_floats(shift32<16>(q))};
  }
};

static inline float raised(int) { return 0; }

static ALWAYS_INLINE Floats to_pairs(Floats v, Pair (&pairs)[8]) {
  store(&pairs[0].even, v);
  return v;
}
static ALWAYS_INLINE Floats dot(Floats sum, Numbers codes, Pair x) {
  return fma(codes.odd, fill(x.odd), fma(codes.even, fill(x.even), sum));
}

#endif
