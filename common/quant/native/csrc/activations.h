// Activations of one call, quantised in blocks of 16 as linear.cpp describes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
    float amax = 0;
    for (int64_t k = 0; k < columns; k++) amax = std::fmax(amax, std::fabs(to_float(x[k])));
    const float scale = amax / 2688.0f;
    tokens[row] = scale > 0 ? scale : 1.0f;
  }

  template <class T>
  void quantize(const T* x, int64_t row, int64_t block, const float* global) {
    const int64_t first = row / TILE * TILE, width = rows - first < TILE ? rows - first : TILE;
    const int64_t unit = first * blocks + block * width + row - first;
    float v[16], amax = 0, damage = 0;  // 0, or NaN where a value is not finite, which then marks the outputs
    for (int k = 0; k < 16; k++) v[k] = to_float(x[(row * blocks + block) * 16 + k]);
    for (int k = 0; k < 16; k++) damage += v[k] * 0.0f;
    for (int k = 0; k < 16; k++) amax = std::fmax(amax, std::fabs(v[k]));
    if (mode == Mode::BITS16) {
      const float inverse = amax > 0 ? 32767.0f / amax : 0.0f;
      int16_t* to = reinterpret_cast<int16_t*>(codes.data()) + unit * 16;
      for (int k = 0; k < 16; k++) to[k] = (int16_t)std::nearbyint(v[k] * inverse);
      scales[unit] = amax / 32767.0f + damage;
      return;
    }
    static constexpr int order[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    int8_t q[16];
    if (mode == Mode::BITS8) {
      const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
      for (int k = 0; k < 16; k++) q[k] = (int8_t)std::nearbyint(v[k] * inverse);
      scales[unit] = amax / 127.0f + damage;
    } else {
      const float token = global ? *global : tokens[row];
      const float raw = amax / 6.0f / token;
      const float scale = amax > 0 ? round_e4m3(std::fmin(std::fmax(raw, 0x1p-9f), 448.0f)) : 1.0f;
      const float step = scale * token;
      for (int k = 0; k < 16; k++) q[k] = (int8_t)e2m1_twice(v[k] / step);
      scales[unit] = scale + damage;
    }
    int8_t* to = reinterpret_cast<int8_t*>(codes.data()) + unit * 16;
    int32_t sum = 0;
    for (int k = 0; k < 16; k++) {
      to[k] = q[order[k]];
      sum += q[k];
    }
    start[unit] = -12 * sum;
  }
};

}  // namespace fourfold
