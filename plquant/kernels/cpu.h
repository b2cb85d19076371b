// What the CPU kernels share: how a weight lies (cpu_layout.py says it), and the codes in it.
//
// Letters: N outputs, K inputs, 16 outputs are a tile, 32 inputs a unit.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

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

static inline Floats load16(const void* p, int64_t i, int dtype, Mask mask = ALL) {
  if (dtype == F32) return load((const float*)p + i, mask);
  Half half = load_half((const uint16_t*)p + i, mask);
  return dtype == F16 ? from_f16(half) : from_bf16(half);
}

// One number, in all lanes.
static inline Floats load1(const void* p, int64_t i, int dtype) {
  if (dtype == F32) return fill(((const float*)p)[i]);
  Half half = _mm256_set1_epi16(((const int16_t*)p)[i]);
  return dtype == F16 ? from_f16(half) : from_bf16(half);
}

static inline void store16(void* p, int64_t i, int dtype, Floats v, Mask mask = ALL) {
  if (dtype == F32) return store((float*)p + i, v, mask);
  store_half((uint16_t*)p + i, dtype == BF16 ? to_bf16(v) : to_f16(v), mask);
}

static inline Floats zero_points(const Weight& w, int64_t i) {
  if (!w.zero_point) return fill((float)(1 << (w.bits - 1)));
  return to_floats(from_bytes(_mm_loadu_si128((const __m128i*)(w.zero_point + i))));
}

// ---- codes -----------------------------------------------------------------------------------------------------------

// Codes of the I-th pair of inputs in a unit, in the low bits of 16-bit lanes; what is above them `only` clears.
template <int B, int I>
static ALWAYS_INLINE Words code(const Words* z) {
  constexpr int fours = B == 8 ? 8 : B >= 4 ? 4 : 0, twos = (B & 2) && B != 8 ? 2 : 0;
  Words q;
  if constexpr (fours) q = plane(shift16<4 * (I % 4)>(load_words(z + I / 4)), 0xf);
  if constexpr (twos && !fours) q = plane(shift16<2 * (I % 8)>(load_words(z + I / 8)), 0x3);
  if constexpr (twos && fours) q = plane(shift16<2 * (I % 8) - 4>(load_words(z + fours + I / 8)), 0x30, q);
  if constexpr (B == 8) q = plane(shift16<4 * (I % 4) - 4>(load_words(z + 4 + I / 4)), 0xf0, q);
  else if constexpr (B & 1) q = plane(shift16<I - (B - 1)>(load_words(z + fours + twos)), 1 << (B - 1), q);
  return q;
}

// Codes of the inputs 2 I, 2 I + 16, 2 I + 1, 2 I + 17 in a unit, as bytes; I from 0 to 7.
template <int B, int I>
static ALWAYS_INLINE Words quad(const Words* z) {
  Words low = fill16((1 << B) - 1), high = shift16<-8>(low);
  return beside(only(code<B, I>(z), low), shift16<-8>(code<B, I + 8>(z)), high);
}
