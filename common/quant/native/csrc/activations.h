// Activations of one call, quantised in blocks of 16 as linear.cpp describes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace fourfold {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  const uint32_t bits = (uint32_t)v.bits << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {(uint16_t)(bits >> 16 | 0x40)};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float e4m3(uint8_t code) {
  const uint32_t e = code >> 3 & 15, m = code & 7, bits = (e + 120) << 23 | m << 20;
  float normal;
  std::memcpy(&normal, &bits, 4);
  return e ? normal : m * 0x1p-9f;
}

// Round a float in [2^-9, 448] to E4M3, ties to even.
inline float round_e4m3(float v) {
  if (v < 0x1p-6f) return std::nearbyint(v * 0x1p9f) * 0x1p-9f;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Twice the nearest E2M1 magnitude, ties to the even code.
inline int e2m1_twice(float v) {
  const float a = std::fabs(v);
  const int m = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + 2 * (a > 2.5f) + 2 * (a >= 3.5f) + 4 * (a > 5.0f);
  return v < 0 ? -m : m;
}

// The nearest integer, ties to even, of |v| < 2^22.
inline int32_t nearest(float v) {
  v += 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits - 0x4b400000;
}

// The largest magnitude. As integers, which vectorise: magnitudes are in the order of their bits, NaN above all.
template <class T>
inline float largest(const T* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t k = 0; k < count; k++) {
    const float v = to_float(x[k]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float amax;
  std::memcpy(&amax, &top, 4);
  return amax;
}

enum class Mode : int32_t { BITS8 = 0, BITS16 = 1, E2M1 = 2 };

constexpr int TILE = 8;  // rows of x that share one decoding of a weight

// Blocks are stored tile by tile, within a tile block by block, the rows of the tile side by side.
struct Activations {
  Mode mode;
  int64_t rows, blocks;
  float unit;                  // of the codes, beside the scales
  std::vector<int32_t> codes;  // 4 words a block (bytes), or 8 (16-bit halves)
  std::vector<int32_t> start;  // bytes: what the zero point of the weights adds, negated
  std::vector<float> scales;   // [rows, blocks]
  std::vector<float> tokens;   // E2M1: global scale of each row

  Activations(Mode mode, int64_t rows, int64_t blocks)
      : mode(mode), rows(rows), blocks(blocks), unit(mode == Mode::E2M1 ? 0.5f : 1.0f),
        codes(rows * blocks * (mode == Mode::BITS16 ? 8 : 4)), start(mode == Mode::BITS16 ? 0 : rows * blocks),
        scales(rows * blocks), tokens(mode == Mode::E2M1 ? rows : 0) {}

  template <class T>
  void token_scale(int64_t row, const T* x, int64_t columns) {
    const float scale = largest(x, columns) / 2688.0f;
    tokens[row] = scale > 0 ? scale : 1.0f;
  }

  template <class T>
  void quantize(const T* x, int64_t row, int64_t block, const float* global) {
    const int64_t first = row / TILE * TILE, width = rows - first < TILE ? rows - first : TILE;
    const int64_t at = first * blocks + block * width + row - first;
    float v[BLOCK];
    for (int k = 0; k < BLOCK; k++) v[k] = to_float(x[(row * blocks + block) * BLOCK + k]);
    const float amax = largest(v, BLOCK), damage = amax * 0.0f;  // NaN where a value is not finite: marks the outputs
    if (mode == Mode::BITS16) {
      const float inverse = amax > 0 ? 32767.0f / amax : 0.0f;
      int16_t* to = reinterpret_cast<int16_t*>(codes.data()) + at * BLOCK;
      for (int k = 0; k < BLOCK; k++) to[k] = (int16_t)nearest(v[k] * inverse);
      scales[at] = amax / 32767.0f + damage;
      return;
    }
    int32_t q[BLOCK], sum = 0;
    if (mode == Mode::BITS8) {
      const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
      for (int k = 0; k < BLOCK; k++) q[k] = nearest(v[k] * inverse);
      scales[at] = amax / 127.0f + damage;
    } else {
      const float token = global ? *global : tokens[row];
      const float raw = amax / 6.0f / token;
      const float scale = amax > 0 ? round_e4m3(std::fmin(std::fmax(raw, 0x1p-9f), 448.0f)) : 1.0f;
      const float step = scale * token;
      for (int k = 0; k < BLOCK; k++) q[k] = e2m1_twice(v[k] / step);
      scales[at] = scale + damage;
    }
    for (int k = 0; k < BLOCK; k++) sum += q[k];
    start[at] = -ZERO_POINT * sum;
    int8_t bytes[BLOCK];
    for (int k = 0; k < BLOCK; k++) bytes[k] = (int8_t)q[k];
    byte_order(bytes, reinterpret_cast<int8_t*>(codes.data()) + at * BLOCK);
  }
};

}  // namespace fourfold
