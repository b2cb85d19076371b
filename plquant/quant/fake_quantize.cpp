// What fake_quantize.py does to a weight, group by group: a group is read once, and all that is made of it stays in the
// first-level cache. The same operations in the same order as those of in_pieces.py, in fp32 without contraction, so
// that codes and scales agree to the bit; sums, which only gradients have, may differ in the order of their terms.
//
// Plain C++ that a compiler turns into vector instructions. Letters: R, G, g as in affine.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

enum Dtype { F32 = 0, BF16 = 1, I8 = 2, U8 = 3 };

// The same struct in native.py.
struct Weight {
  const void* groups;  // [R, G, g], F32 or BF16
  const float* inner;  // [G, g] or null
  const float* outer;  // [R] or null
  const float* low;    // shares of the range, [R, G] or null
  const float* high;
  const float* nudge;  // [R, G, g] or null
  float* ranges;       // [6, R, G]: low, high, lo, hi, scale, zero_point
  int64_t rows, per_row, size;
  int32_t dtype, scale_dtype, qmin, qmax, symmetric, threads;
};

// Each may be null.
struct Gradients {
  void* groups;   // [R, G, g] in the weight's dtype
  float* inner;   // [threads, G, g], to be summed over threads
  float* outer;   // [R]
  float* low;     // [R, G]
  float* high;    // [R, G]
  float* nudge;   // [R, G, g]
};

static inline float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return value != value ? 0x7fc0 : (uint16_t)nearest;
}

static inline void read(const void* from, int64_t at, int dtype, int64_t size, float* __restrict to) {
  if (dtype == F32) {
    memcpy(to, (const float*)from + at, size * sizeof(float));
    return;
  }
  const uint16_t* half = (const uint16_t*)from + at;
#pragma omp simd
  for (int64_t i = 0; i < size; i++) to[i] = from_bf16(half[i]);
}

static inline void write(const float* __restrict from, void* to, int64_t at, int dtype, int64_t size) {
  if (dtype == F32) {
    memcpy((float*)to + at, from, size * sizeof(float));
  } else if (dtype == BF16) {
    uint16_t* half = (uint16_t*)to + at;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) half[i] = to_bf16(from[i]);
  } else {  // a code, signed or not
    uint8_t* code = (uint8_t*)to + at;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) code[i] = (uint8_t)(int32_t)from[i];
  }
}

// The group as it is rounded.
static inline void product(const Weight& w, int64_t row, int64_t group, float* __restrict to) {
  read(w.groups, (row * w.per_row + group) * w.size, w.dtype, w.size, to);
  if (w.inner) {
    const float* inner = w.inner + group * w.size;
#pragma omp simd
    for (int64_t i = 0; i < w.size; i++) to[i] *= inner[i];
  }
  if (w.outer) {
    const float outer = w.outer[row];
#pragma omp simd
    for (int64_t i = 0; i < w.size; i++) to[i] *= outer;
  }
}

struct Range {
  float low, high, lo, hi, scale, zero_point;
};

static inline float clamped(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

static Range range_of(const Weight& w, int64_t at, const float* values) {
  float low = 0, high = 0;
  int32_t unordered = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unordered)
  for (int64_t i = 0; i < w.size; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
    unordered |= values[i] != values[i];
  }
  if (unordered) low = high = std::numeric_limits<float>::quiet_NaN();
  Range r{low, high, low, high, 0, 0};
  if (w.low) r.lo = low * w.low[at], r.hi = high * w.high[at];
  float up = r.hi / w.qmax, down = r.lo / w.qmin;
  r.scale = !w.symmetric ? (r.hi - r.lo) / (w.qmax - w.qmin) : up != up || up > down ? up : down;
  if (w.scale_dtype == BF16) r.scale = from_bf16(to_bf16(r.scale));
  const float tiny = std::numeric_limits<float>::min();
  r.scale = r.scale < tiny ? tiny : r.scale;
  r.zero_point = w.symmetric ? 0 : clamped(nearbyintf(-r.lo / r.scale), w.qmin, w.qmax);
  return r;
}

// Steps before they are clamped, relative to the zero-point.
static inline void rounded(const Weight& w, int64_t at, float scale, const float* __restrict values,
                           float* __restrict to) {
  if (w.nudge) {
    const float* nudge = w.nudge + at * w.size;
#pragma omp simd
    for (int64_t i = 0; i < w.size; i++) to[i] = nearbyintf(values[i] / scale + nudge[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < w.size; i++) to[i] = nearbyintf(values[i] / scale);
  }
}

// Values, to F32 or BF16, or codes, to I8 or U8.
extern "C" void plquant_quantize(const Weight* weight, void* out, int32_t dtype) {
  const Weight& w = *weight;
  const int64_t count = w.rows * w.per_row;
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> memory(2 * w.size);
    float *values = memory.data(), *steps = values + w.size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.rows; row++) {
      for (int64_t group = 0; group < w.per_row; group++) {
        const int64_t at = row * w.per_row + group;
        product(w, row, group, values);
        const Range r = range_of(w, at, values);
        const float all[6] = {r.low, r.high, r.lo, r.hi, r.scale, r.zero_point};
        for (int64_t i = 0; i < 6; i++) w.ranges[i * count + at] = all[i];
        rounded(w, at, r.scale, values, steps);
        const float least = w.qmin - r.zero_point, most = w.qmax - r.zero_point;
        const bool codes = dtype == I8 || dtype == U8;
        const float times = codes ? 1 : r.scale, plus = codes ? r.zero_point : 0;
#pragma omp simd
        for (int64_t i = 0; i < w.size; i++) steps[i] = clamped(steps[i], least, most) * times + plus;
        write(steps, out, at * w.size, dtype, w.size);
      }
    }
  }
}

// Gradients of the ends of the range that is kept.
struct Ends {
  float lo, hi;
};

// The group's gradient with its range held fixed, to `passed`, and the gradients of its ends.
static Ends straight_through(const Weight& w, const Range& r, const float* __restrict values,
                             const float* __restrict steps, const float* __restrict grad, float* __restrict passed) {
  const float below = w.qmin - 0.5f, above = w.qmax + 0.5f;
  float g_scale = 0, total = 0, inside = 0, through = 0;
#pragma omp simd reduction(+ : g_scale, total, inside, through)
  for (int64_t i = 0; i < w.size; i++) {
    const float code = steps[i] + r.zero_point;
    passed[i] = code <= below || code >= above ? 0 : grad[i];
    g_scale += clamped(code, w.qmin, w.qmax) * grad[i];
    total += grad[i];
    inside += passed[i];
    through += passed[i] * values[i];
  }
  if (w.symmetric) {  // scale = max(hi / qmax, lo / qmin), and zero_point = 0
    g_scale -= through / r.scale;
    return r.hi / w.qmax >= r.lo / w.qmin ? Ends{0, g_scale / w.qmax} : Ends{g_scale / w.qmin, 0};
  }
  const float clipped = total - inside;
  const float g_hi =
      (g_scale - r.zero_point * total - (through + clipped * r.lo) / r.scale) / (w.qmax - w.qmin);
  return {clipped - g_hi, g_hi};
}

extern "C" void plquant_quantize_backward(const Weight* weight, const void* out, int32_t out_dtype,
                                          const Gradients* gradients) {
  const Weight& w = *weight;
  const Gradients& g = *gradients;
  const int64_t count = w.rows * w.per_row, width = w.per_row * w.size;
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> memory(4 * w.size), sums(g.inner ? width : 0);
    float *values = memory.data(), *steps = values + w.size, *grad = steps + w.size, *passed = grad + w.size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.rows; row++) {
      float g_outer = 0;
      for (int64_t group = 0; group < w.per_row; group++) {
        const int64_t at = row * w.per_row + group;
        float all[6];
        for (int64_t i = 0; i < 6; i++) all[i] = w.ranges[i * count + at];
        const Range r{all[0], all[1], all[2], all[3], all[4], all[5]};
        read(out, at * w.size, out_dtype, w.size, grad);
        product(w, row, group, values);
        rounded(w, at, r.scale, values, steps);
        const Ends ends = straight_through(w, r, values, steps, grad, passed);
        if (g.low) g.low[at] = ends.lo * r.low, g.high[at] = ends.hi * r.high;
        if (g.nudge) {
          float* nudge = g.nudge + at * w.size;
#pragma omp simd
          for (int64_t i = 0; i < w.size; i++) nudge[i] = passed[i] * r.scale;
        }
        if (!g.groups && !g.inner && !g.outer) continue;

        // The gradient of a range is added to that of the weights which are its ends, in equal parts.
        int32_t lows = 0, highs = 0;
#pragma omp simd reduction(+ : lows, highs)
        for (int64_t i = 0; i < w.size; i++) {
          lows += values[i] == r.low;
          highs += values[i] == r.high;
        }
        const float low = ends.lo * r.lo / (lows ? lows : 1), high = ends.hi * r.hi / (highs ? highs : 1);
        if (g.inner || g.outer) {
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < w.size; i++) {
            steps[i] = passed[i] * values[i] + (values[i] == r.low ? low : 0) + (values[i] == r.high ? high : 0);
            sum += steps[i];
          }
          g_outer += sum;
        }
        if (g.inner) {
          float* into = sums.data() + group * w.size;
#pragma omp simd
          for (int64_t i = 0; i < w.size; i++) into[i] += steps[i];
        }
        if (g.groups) {
          const float at_low = r.low == 0 ? 0 : low / r.low, at_high = r.high == 0 ? 0 : high / r.high;
          const float outer = w.outer ? w.outer[row] : 1;
#pragma omp simd
          for (int64_t i = 0; i < w.size; i++) {
            const float at_ends = (values[i] == r.low ? at_low : 0) + (values[i] == r.high ? at_high : 0);
            steps[i] = passed[i] + at_ends;
          }
          if (w.inner) {
            const float* inner = w.inner + group * w.size;
#pragma omp simd
            for (int64_t i = 0; i < w.size; i++) steps[i] *= inner[i];
          }
          if (w.outer) {
#pragma omp simd
            for (int64_t i = 0; i < w.size; i++) steps[i] *= outer;
          }
          write(steps, g.groups, at * w.size, w.dtype, w.size);
        }
      }
      if (g.outer) g.outer[row] = g_outer;
    }
    if (g.inner) {
#ifdef _OPENMP
      const int64_t thread = omp_get_thread_num();
#else
      const int64_t thread = 0;
#endif
      memcpy(g.inner + thread * width, sums.data(), width * sizeof(float));
    }
  }
}
