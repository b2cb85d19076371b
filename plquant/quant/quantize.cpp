// What fake_quantize.py does to a weight, group by group, and token_quantize.py to activations, row by row. Each is read
// once, and all that is made of it stays in the first-level cache. The same operations in the same order as those in
// Python, in fp32 without contraction, so that codes and scales agree to the bit; sums, which only gradients have, may
// differ from those in the order of their terms, but not with the number of threads.
//
// Plain C++ that a compiler turns into vector instructions. Letters: R, G, g as in affine.py; K channels of a row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

enum Dtype { F32 = 0, BF16 = 1, I8 = 2, U8 = 3 };

// Codes from qmin to qmax.
struct Grid {
  int32_t qmin, qmax, symmetric, scale_dtype;
};

// These structs are the same in native.py.
struct Weight {
  const void* groups;  // [R, G, g], F32 or BF16
  const float* inner;  // [G, g] or null
  const float* outer;  // [R] or null
  const float* low;    // shares of the range, [R, G] or null
  const float* high;
  const float* nudge;  // [R, G, g] or null
  float* ranges;       // [6, R, G]: low, high, lo, hi, scale, zero_point
  int64_t rows, per_row, size;
  Grid grid;
  int32_t dtype, threads;
};

// Rows are cut into so many stretches, whatever the number of threads: no sum depends on that.
const int64_t STRETCHES = 64;

// Each may be null.
struct WeightGradients {
  void* groups;   // [R, G, g] in the weight's dtype
  float* inner;   // [STRETCHES, G, g], zeros, to be summed over the first
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

// Scale and zero-point for the ends that are kept: choose_qparams.
static inline void choose(const Grid& grid, Range& r) {
  const float up = r.hi / grid.qmax, down = r.lo / grid.qmin;
  r.scale = !grid.symmetric ? (r.hi - r.lo) / (grid.qmax - grid.qmin) : up != up || up > down ? up : down;
  if (grid.scale_dtype == BF16) r.scale = from_bf16(to_bf16(r.scale));
  const float tiny = std::numeric_limits<float>::min();
  r.scale = r.scale < tiny ? tiny : r.scale;
  r.zero_point = grid.symmetric ? 0 : clamped(nearbyintf(-r.lo / r.scale), grid.qmin, grid.qmax);
}

// The least and the greatest of some values and of `low` and `high`; not a number if one of them is not.
static inline Range extremes(const float* values, int64_t size, float low, float high) {
  int32_t unordered = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unordered)
  for (int64_t i = 0; i < size; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
    unordered |= values[i] != values[i];
  }
  if (unordered) low = high = std::numeric_limits<float>::quiet_NaN();
  return {low, high, low, high, 0, 0};
}

static Range range_of(const Weight& w, int64_t at, const float* values) {
  Range r = extremes(values, w.size, 0, 0);
  if (w.low) r.lo = r.low * w.low[at], r.hi = r.high * w.high[at];
  choose(w.grid, r);
  return r;
}

// Steps before they are clamped, relative to the zero-point.
static inline void rounded(const float* nudge, int64_t size, float scale, const float* __restrict values,
                           float* __restrict to) {
  if (nudge) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) to[i] = nearbyintf(values[i] / scale + nudge[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) to[i] = nearbyintf(values[i] / scale);
  }
}

// Rounded steps to values, or to codes, of that dtype.
static inline void finish(const Grid& grid, const Range& r, float* steps, int64_t size, void* out, int64_t at,
                          int dtype) {
  const float least = grid.qmin - r.zero_point, most = grid.qmax - r.zero_point;
  const bool codes = dtype == I8 || dtype == U8;
  const float times = codes ? 1 : r.scale, plus = codes ? r.zero_point : 0;
#pragma omp simd
  for (int64_t i = 0; i < size; i++) steps[i] = clamped(steps[i], least, most) * times + plus;
  write(steps, out, at, dtype, size);
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
        rounded(w.nudge ? w.nudge + at * w.size : nullptr, w.size, r.scale, values, steps);
        finish(w.grid, r, steps, w.size, out, at * w.size, dtype);
      }
    }
  }
}

// Gradients of the ends of the range that is kept.
struct Ends {
  float lo, hi;
};

// scale = max(hi / qmax, lo / qmin), and zero_point = 0.
static inline Ends symmetric_ends(const Grid& grid, const Range& r, float g_scale) {
  const bool from_hi = r.hi / grid.qmax >= r.lo / grid.qmin;
  return from_hi ? Ends{0, g_scale / grid.qmax} : Ends{g_scale / grid.qmin, 0};
}

// The group's gradient with its range held fixed, to `passed`, and the gradients of its ends.
static Ends straight_through(const Weight& w, const Range& r, const float* __restrict values,
                             const float* __restrict steps, const float* __restrict grad, float* __restrict passed) {
  const Grid& grid = w.grid;
  const float below = grid.qmin - 0.5f, above = grid.qmax + 0.5f;
  float g_scale = 0, total = 0, inside = 0, through = 0;
#pragma omp simd reduction(+ : g_scale, total, inside, through)
  for (int64_t i = 0; i < w.size; i++) {
    const float code = steps[i] + r.zero_point;
    passed[i] = code <= below || code >= above ? 0 : grad[i];
    g_scale += clamped(code, grid.qmin, grid.qmax) * grad[i];
    total += grad[i];
    inside += passed[i];
    through += passed[i] * values[i];
  }
  if (grid.symmetric) return symmetric_ends(grid, r, g_scale - through / r.scale);
  const float clipped = total - inside;
  const float of_scale = g_scale - r.zero_point * total - (through + clipped * r.lo) / r.scale;
  const float g_hi = of_scale / (grid.qmax - grid.qmin);
  return {clipped - g_hi, g_hi};
}

extern "C" void plquant_quantize_backward(const Weight* weight, const void* out, int32_t out_dtype,
                                          const WeightGradients* gradients) {
  const Weight& w = *weight;
  const WeightGradients& g = *gradients;
  const int64_t count = w.rows * w.per_row, width = w.per_row * w.size;
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> memory(4 * w.size);
    float *values = memory.data(), *steps = values + w.size, *grad = steps + w.size, *passed = grad + w.size;
    const int64_t length = (w.rows + STRETCHES - 1) / STRETCHES;
#pragma omp for schedule(static)
    for (int64_t stretch = 0; stretch < STRETCHES; stretch++) {
      const int64_t stop = std::min(w.rows, (stretch + 1) * length);
      for (int64_t row = stretch * length; row < stop; row++) {
        float g_outer = 0;
        for (int64_t group = 0; group < w.per_row; group++) {
          const int64_t at = row * w.per_row + group;
          float all[6];
          for (int64_t i = 0; i < 6; i++) all[i] = w.ranges[i * count + at];
          const Range r{all[0], all[1], all[2], all[3], all[4], all[5]};
          read(out, at * w.size, out_dtype, w.size, grad);
          product(w, row, group, values);
          rounded(w.nudge ? w.nudge + at * w.size : nullptr, w.size, r.scale, values, steps);
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
            float* into = g.inner + stretch * width + group * w.size;
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
    }
  }
}

struct Rows {
  const void* values;   // [R, K], F32 or BF16
  const float* offset;  // [K] or null
  const float* low;     // share of the range, a scalar or null
  const float* high;
  int64_t rows, size;
  Grid grid;
  int32_t dtype, threads;
};

static Range row_range(const Rows& x, const float* values) {
  Range r = extremes(values, x.size, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity());
  r.lo = r.low > 0 ? 0 : r.low, r.hi = r.high < 0 ? 0 : r.high;
  if (x.low) r.lo *= *x.low, r.hi *= *x.high;
  choose(x.grid, r);
  return r;
}

// Values in the dtype of the rows, or codes; scale and zero_point [R] may be null.
extern "C" void plquant_quantize_rows(const Rows* all, void* out, int32_t dtype, float* scale, float* zero_point) {
  const Rows& x = *all;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> memory(2 * x.size);
    float *values = memory.data(), *steps = values + x.size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.rows; row++) {
      read(x.values, row * x.size, x.dtype, x.size, values);
      const Range r = row_range(x, values);
      if (scale) scale[row] = r.scale, zero_point[row] = r.zero_point;
      rounded(x.offset, x.size, r.scale, values, steps);
      finish(x.grid, r, steps, x.size, out, row * x.size, dtype);
    }
  }
}

// Fields of `width` bits, those from `low` on of each code, 8 / width of them in a byte: the layout of token_bytes.py.
static inline void pack_plane(const uint8_t* codes, int64_t count, int width, int low, uint8_t* __restrict to) {
  const uint8_t mask = (uint8_t)((1 << width) - 1);
  for (int at = 0; at < 8; at += width, codes += count)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = (uint8_t)((at ? to[i] : 0) | (codes[i] >> low & mask) << at);
}

static inline void unpack_plane(const uint8_t* from, int64_t count, int width, int low, uint8_t* __restrict codes) {
  const uint8_t mask = (uint8_t)((1 << width) - 1);
  for (int at = 0; at < 8; at += width, codes += count)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)((low ? codes[i] : 0) | (from[i] >> at & mask) << low);
}

// Rows of `stride` bytes: scale, zero-point (none if symmetric), codes from 0 in planes.
extern "C" void plquant_rows_to_bytes(const Rows* all, uint8_t* out, int64_t stride, int32_t bits) {
  const Rows& x = *all;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> memory(2 * x.size);
    std::vector<uint8_t> codes(x.size);
    float *values = memory.data(), *steps = values + x.size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.rows; row++) {
      read(x.values, row * x.size, x.dtype, x.size, values);
      const Range r = row_range(x, values);
      rounded(nullptr, x.size, r.scale, values, steps);
      finish(x.grid, r, steps, x.size, codes.data(), 0, U8);
      if (x.grid.symmetric)
        for (int64_t i = 0; i < x.size; i++) codes[i] = (uint8_t)(codes[i] - x.grid.qmin);
      uint8_t* to = out + row * stride;
      memcpy(to, &r.scale, sizeof(float));
      to += sizeof(float);
      if (!x.grid.symmetric) *to++ = (uint8_t)r.zero_point;
      for (int width = 8, low = 0; width; width /= 2) {
        if (!(bits & width)) continue;
        const int64_t count = x.size * width / 8;
        pack_plane(codes.data(), count, width, low, to);
        to += count, low += width;
      }
    }
  }
}

// The inverse; only the shape, the grid and the threads of `all` are read, and the dtype, which is that of `out`.
extern "C" void plquant_rows_from_bytes(const Rows* all, const uint8_t* bytes, int64_t stride, int32_t bits, void* out) {
  const Rows& x = *all;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> values(x.size);
    std::vector<uint8_t> codes(x.size);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.rows; row++) {
      const uint8_t* from = bytes + row * stride;
      float scale;
      memcpy(&scale, from, sizeof(float));
      from += sizeof(float);
      const float zero_point = x.grid.symmetric ? -x.grid.qmin : *from++;
      for (int width = 8, low = 0; width; width /= 2) {
        if (!(bits & width)) continue;
        const int64_t count = x.size * width / 8;
        unpack_plane(from, count, width, low, codes.data());
        from += count, low += width;
      }
#pragma omp simd
      for (int64_t i = 0; i < x.size; i++) values[i] = (codes[i] - zero_point) * scale;
      write(values.data(), out, row * x.size, x.dtype, x.size);
    }
  }
}

// Of rows: to `to`, in their dtype. Of the shares of their ranges: low and high [R], may be null.
extern "C" void plquant_quantize_rows_backward(const Rows* all, const void* out, void* to, float* low, float* high) {
  const Rows& x = *all;
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> memory(3 * x.size);
    float *values = memory.data(), *steps = values + x.size, *grad = steps + x.size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.rows; row++) {
      read(x.values, row * x.size, x.dtype, x.size, values);
      read(out, row * x.size, x.dtype, x.size, grad);
      const Range r = row_range(x, values);
      rounded(x.offset, x.size, r.scale, values, steps);
      const float least = x.grid.qmin - r.zero_point, most = x.grid.qmax - r.zero_point;
      float g_scale = 0, clipped = 0;
      if (x.low) {
#pragma omp simd reduction(+ : g_scale, clipped)
        for (int64_t i = 0; i < x.size; i++) {
          const float step = clamped(steps[i], least, most);
          const float beyond = step == steps[i] ? 0 : grad[i];
          g_scale += step * grad[i] - (grad[i] - beyond) * (values[i] / r.scale);
          clipped += beyond;
          grad[i] -= beyond;
        }
        if (!x.grid.symmetric) g_scale -= r.lo / r.scale * clipped;
      } else {  // only the rounding of the zero-point can clip, by less than a step: straight-through as well
#pragma omp simd reduction(+ : g_scale)
        for (int64_t i = 0; i < x.size; i++)
          g_scale += (clamped(steps[i], least, most) - values[i] / r.scale) * grad[i];
      }
      const float g_hi = g_scale / (x.grid.qmax - x.grid.qmin);
      Ends ends = x.grid.symmetric ? symmetric_ends(x.grid, r, g_scale) : Ends{clipped - g_hi, g_hi};
      // Where all values lie on one side of zero the range ends at zero, which no value moves.
      if (!(r.low < 0)) ends.lo = 0;
      if (!(r.high > 0)) ends.hi = 0;
      if (low) low[row] = ends.lo * r.low, high[row] = ends.hi * r.high;
      int32_t at_low = x.size - 1, at_high = x.size - 1;  // the first of equal ones
#pragma omp simd reduction(min : at_low, at_high)
      for (int32_t i = 0; i < (int32_t)x.size; i++) {
        at_low = values[i] == r.low && i < at_low ? i : at_low;
        at_high = values[i] == r.high && i < at_high ? i : at_high;
      }
      grad[at_low] += x.low ? ends.lo * *x.low : ends.lo;
      grad[at_high] += x.high ? ends.hi * *x.high : ends.hi;
      write(grad, to, row * x.size, x.dtype, x.size);
    }
  }
}
