// NVFP4 quantisation of a weight [N, K]: the search of fourfold.common.quant.scales, 16 rows in lanes.
//
// Loops over `lane` are what the compiler vectorises. Errors are summed in float32 in another order than in PyTorch, so
// the two may differ where two scales are equally good to the last bits; the codes for a given scale are the same.
#include <algorithm>
#include <vector>

#include "activations.h"

namespace fourfold {

constexpr int LANES = 16;

// The E2M1 magnitude nearest to x >= 0, ties to the even code. A float that large has the step of x as its last bit.
static inline float round_e2m1(float x) {
  const float base = std::max(x, 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &base, 4);
  bits = ((bits & 0x7f800000) + (22u << 23)) | 0x400000;
  float large;
  std::memcpy(&large, &bits, 4);
  return std::min((x + large) - large, 6.0f);
}

static uint8_t code_of(float scale) {  // of an E4M3 value in [2^-9, 448]
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  if (scale < 0x1p-6f) return (uint8_t)(scale * 0x1p9f);
  return (uint8_t)((bits >> 20) - (120 << 3));
}

static uint8_t nearest_code(float v) { return code_of(round_e4m3(std::min(std::max(v, 0x1p-9f), 448.0f))); }

struct Group {
  float w[16][LANES];    // [input][row]
  float amax[LANES];
  uint8_t best[LANES];
  float least[LANES];

  void attempt(const uint8_t* codes, float global, const float* importance) {
    float step[LANES], inverse[LANES], total[LANES] = {};
    for (int lane = 0; lane < LANES; lane++) {
      step[lane] = e4m3(codes[lane]) * global;
      inverse[lane] = 1.0f / step[lane];
    }
    for (int k = 0; k < 16; k++) {
      const float weight = importance ? importance[k] : 1.0f;
      for (int lane = 0; lane < LANES; lane++) {
        const float a = std::fabs(w[k][lane]), d = a - round_e2m1(a * inverse[lane]) * step[lane];
        total[lane] += weight * (d * d);
      }
    }
    for (int lane = 0; lane < LANES; lane++) {
      const bool better = total[lane] < least[lane];
      least[lane] = better ? total[lane] : least[lane];
      best[lane] = better ? codes[lane] : best[lane];
    }
  }
};

template <class T>
static void quantize(const T* weight, int64_t rows, int64_t columns, int64_t stride, float global,
                     const float* importance, int low, int high, bool four_over_six, uint8_t* packed, uint8_t* scales) {
  const int64_t blocks = columns / 16, groups = (rows + LANES - 1) / LANES;
#pragma omp parallel for
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * LANES, count = std::min<int64_t>(LANES, rows - first);
    Group group;
    for (int64_t b = 0; b < blocks; b++) {
      for (int lane = 0; lane < LANES; lane++) {
        const T* from = weight + (first + std::min<int64_t>(lane, count - 1)) * stride + b * 16;
        for (int k = 0; k < 16; k++) group.w[k][lane] = to_float(from[k]);
      }
      for (int lane = 0; lane < LANES; lane++) group.amax[lane] = 0, group.least[lane] = 3.4e38f;
      for (int k = 0; k < 16; k++)
        for (int lane = 0; lane < LANES; lane++) group.amax[lane] = std::max(group.amax[lane], std::fabs(group.w[k][lane]));
      uint8_t nearest[LANES], codes[LANES];
      for (int lane = 0; lane < LANES; lane++)
        group.best[lane] = nearest[lane] = nearest_code(group.amax[lane] / 6.0f / global);
      const float* importances = importance ? importance + b * 16 : nullptr;
      if (four_over_six) {
        group.attempt(nearest, global, nullptr);
        for (int lane = 0; lane < LANES; lane++) codes[lane] = nearest_code(group.amax[lane] / 4.0f / global);
        group.attempt(codes, global, nullptr);
      } else if (low != high) {
        for (int offset = low; offset <= high; offset++) {
          for (int lane = 0; lane < LANES; lane++) codes[lane] = (uint8_t)std::clamp(nearest[lane] + offset, 1, 126);
          group.attempt(codes, global, importances);
        }
      }
      for (int lane = 0; lane < LANES; lane++)
        if (group.amax[lane] == 0) group.best[lane] = 0x38;  // a block of zeros has scale 1
      uint8_t bytes[8][LANES] = {};
      float step[LANES];
      for (int lane = 0; lane < LANES; lane++) step[lane] = e4m3(group.best[lane]) * global;
      for (int k = 0; k < 16; k++)
        for (int lane = 0; lane < LANES; lane++) {
          const float x = group.w[k][lane] / step[lane], a = std::fabs(x);
          uint32_t bits;
          std::memcpy(&bits, &x, 4);
          const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
          bytes[k / 2][lane] |= (uint8_t)((code | (int)(bits >> 31) << 3) << 4 * (k % 2));
        }
      for (int64_t lane = 0; lane < count; lane++) {
        uint8_t* to = packed + (first + lane) * columns / 2 + b * 8;
        for (int i = 0; i < 8; i++) to[i] = bytes[i][lane];
        scales[(first + lane) * blocks + b] = group.best[lane];
      }
    }
  }
}

}  // namespace fourfold

// weight: float32 or bfloat16, `stride` elements from row to row. Scale codes from low to high around that of amax / 6
// are tried (none if they are equal). packed uint8 [N, K / 2], scales uint8 [N, K / 16].
extern "C" void fourfold_quantize(const void* weight, int32_t bfloat16, int64_t rows, int64_t columns, int64_t stride,
                                  float global, const float* importance, int32_t low, int32_t high,
                                  int32_t four_over_six, uint8_t* packed, uint8_t* scales) {
  using namespace fourfold;
  if (bfloat16)
    quantize(static_cast<const bf16*>(weight), rows, columns, stride, global, importance, low, high, four_over_six,
             packed, scales);
  else
    quantize(static_cast<const float*>(weight), rows, columns, stride, global, importance, low, high, four_over_six,
             packed, scales);
}
