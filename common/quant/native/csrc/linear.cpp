// y = x W^T for NVFP4 weights on a CPU, decoded in registers and multiplied as integers.
//
// Layout of W [N, K]: groups of 16 rows (the last padded with zeros); a group is K / 16 blocks of 144 bytes, 128 of
// codes (two half blocks, see lanes.h) and 16 E4M3 block scales. x is quantised in blocks of 16, one float scale each:
//   BITS8   int8, amax / 127
//   BITS16  int16, amax / 32767: as exact as the 16-bit activations that come in
//   E2M1    NVFP4 itself (W4A4), E4M3 block scales and a global scale: the products are exact
#include <omp.h>

#include "activations.h"

namespace fourfold {

constexpr int64_t PREFETCH_BYTES = 12 * BLOCK_BYTES;

// Hardware prefetchers stop at the end of a page; a block far ahead keeps the memory busy across them.
static inline void prefetch(const uint8_t* block) {
  for (int line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(block + PREFETCH_BYTES + line);
}

// Accumulates G groups of weights, `stride` bytes apart, times M rows of activations, into out[G * m + g].
template <int M, int G>
static void tile_bytes(const uint8_t* w, int64_t stride, int64_t blocks, const Activations& x, int64_t m0,
                       float (*out)[ROWS]) {
  const int32_t *input = x.codes.data() + 4 * m0 * blocks, *start = x.start.data() + m0 * blocks;
  const float* factor = x.scales.data() + m0 * blocks;
  for (int sub = 0; sub < ROWS; sub += Lanes::L) {
    Lanes::Floats acc[M][G];
    for (int m = 0; m < M; m++)
      for (int g = 0; g < G; g++) acc[m][g] = Lanes::zero();
    for (int64_t b = 0; b < blocks; b++) {
      Lanes::Bytes codes[G][4];
      Lanes::Floats scale[G];
      for (int g = 0; g < G; g++) {
        const uint8_t* block = w + g * stride + b * BLOCK_BYTES;
        prefetch(block);
        Lanes::bytes(block + 4 * sub, codes[g]);
        Lanes::bytes(block + 64 + 4 * sub, codes[g] + 2);
        scale[g] = Lanes::scales(block + CODE_BYTES + sub);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const int64_t at = b * M + m;
        Lanes::Ints sum[G];
        Lanes::dot_block<G>(sum, start[at], codes, input + 4 * at);
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) acc[m][g] = Lanes::add_scaled(acc[m][g], sum[g], factor[at], scale[g]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int g = 0; g < G; g++) Lanes::store(out[G * m + g] + sub, acc[m][g]);
  }
}

template <int M, int G>
static void tile_halves(const uint8_t* w, int64_t stride, int64_t blocks, const Activations& x, int64_t m0,
                        float (*out)[ROWS]) {
  const int32_t* input = x.codes.data() + 8 * m0 * blocks;
  const float* factor = x.scales.data() + m0 * blocks;
  for (int sub = 0; sub < ROWS; sub += Lanes::L) {
    Lanes::Floats acc[M][G];
    for (int m = 0; m < M; m++)
      for (int g = 0; g < G; g++) acc[m][g] = Lanes::zero();
    for (int64_t b = 0; b < blocks; b++) {
      Lanes::Ints sum[M][G];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        Lanes::Halves codes[G][4];
        if (half == 0)
          for (int g = 0; g < G; g++) prefetch(w + g * stride + b * BLOCK_BYTES);
        for (int g = 0; g < G; g++) Lanes::halves(w + g * stride + b * BLOCK_BYTES + 64 * half + 4 * sub, codes[g]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const int32_t* a = input + 8 * (b * M + m) + 4 * half;
#pragma GCC unroll 2
          for (int g = 0; g < G; g++) {
            if (half == 0) sum[m][g] = Lanes::ints(0);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[m][g] = Lanes::dot_halves(sum[m][g], codes[g][j], a[j]);
          }
        }
      }
      for (int g = 0; g < G; g++) {
        const Lanes::Floats scale = Lanes::scales(w + g * stride + b * BLOCK_BYTES + CODE_BYTES + sub);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m][g] = Lanes::add_scaled(acc[m][g], sum[m][g], factor[b * M + m], scale);
      }
    }
    for (int m = 0; m < M; m++)
      for (int g = 0; g < G; g++) Lanes::store(out[G * m + g] + sub, acc[m][g]);
  }
}

using TileFn = void (*)(const uint8_t*, int64_t, int64_t, const Activations&, int64_t, float (*)[ROWS]);
template <int G>
static TileFn tile_of(bool halves, int64_t rows) {
  static constexpr TileFn BYTES[TILE] = {tile_bytes<1, G>, tile_bytes<2, G>, tile_bytes<3, G>, tile_bytes<4, G>,
                                         tile_bytes<5, G>, tile_bytes<6, G>, tile_bytes<7, G>, tile_bytes<8, G>};
  static constexpr TileFn HALVES[TILE] = {tile_halves<1, G>, tile_halves<2, G>, tile_halves<3, G>, tile_halves<4, G>,
                                          tile_halves<5, G>, tile_halves<6, G>, tile_halves<7, G>, tile_halves<8, G>};
  return (halves ? HALVES : BYTES)[rows - 1];
}

template <class T>
static void multiply(const T* x, int64_t rows, int64_t columns, const uint8_t* w, int64_t outputs, int64_t first,
                     int64_t last, const float* row_scales, const float* bias, T* y, Mode mode, const float* global) {
  const int64_t blocks = columns / BLOCK, group_bytes = blocks * BLOCK_BYTES;
  Activations act(mode, rows, blocks);
  const bool halves = mode == Mode::BITS16;
  const float unit = WEIGHT_UNIT * SCALE_UNIT * act.unit / (halves ? Lanes::HALF_UNIT : 1);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t units = rows * blocks;
    if (mode == Mode::E2M1 && global == nullptr) {
      for (int64_t m = me; m < rows; m += threads) act.token_scale(m, x + m * columns, columns);
#pragma omp barrier
    }
    for (int64_t u = units * me / threads; u < units * (me + 1) / threads; u++) act.quantize(x, u / blocks, u % blocks, global);
#pragma omp barrier
    // A tile decodes Lanes::GROUPS groups at once, where a row of activations is worth loading once for all of them.
    const int64_t begin = first / ROWS, groups = (last + ROWS - 1) / ROWS - begin;
    const int64_t end = begin + groups * (me + 1) / threads;
    float out[TILE * Lanes::GROUPS][ROWS];
    for (int64_t at = begin + groups * me / threads, width; at < end; at += width) {
      width = rows >= Lanes::GROUPS_FROM && end - at >= Lanes::GROUPS ? Lanes::GROUPS : 1;
      for (int64_t m0 = 0; m0 < rows; m0 += TILE) {
        const int64_t count = rows - m0 < TILE ? rows - m0 : TILE;
        const TileFn tile = width == 1 ? tile_of<1>(halves, count) : tile_of<Lanes::GROUPS>(halves, count);
        tile(w + at * group_bytes, group_bytes, blocks, act, m0, out);
        for (int64_t m = 0; m < count; m++) {
          const float token = mode == Mode::E2M1 ? (global ? *global : act.tokens[m0 + m]) : 1.0f;
          T* to = y + (m0 + m) * outputs;
          for (int64_t r = 0; r < width * ROWS; r++) {
            const int64_t row = at * ROWS + r;
            if (row < first || row >= last) continue;
            const float value = out[width * m + r / ROWS][r % ROWS] * (row_scales[row] * unit) * token;
            to[row] = from_float<T>(value + (bias ? bias[row] : 0.0f));
          }
        }
      }
    }
  }
}

}  // namespace fourfold

using namespace fourfold;

extern "C" {

// x [rows, columns] and y [rows, outputs], float32 or bfloat16; output rows first to last are written. global: the
// static global scale of E2M1, or null for one a token.
void fourfold_linear(const void* x, int64_t rows, int64_t columns, const uint8_t* w, int64_t outputs, int64_t first,
                     int64_t last, const float* row_scales, const float* bias, void* y, int32_t mode,
                     const float* global, int32_t bfloat16) {
  const auto m = static_cast<Mode>(mode);
  if (bfloat16)
    multiply(static_cast<const bf16*>(x), rows, columns, w, outputs, first, last, row_scales, bias,
             static_cast<bf16*>(y), m, global);
  else
    multiply(static_cast<const float*>(x), rows, columns, w, outputs, first, last, row_scales, bias,
             static_cast<float*>(y), m, global);
}

// codes uint8 [N, K / 2], low nibble first, and scales uint8 [N, K / 16], to the layout above.
void fourfold_pack(const uint8_t* codes, const uint8_t* scales, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t blocks = columns / BLOCK, groups = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for
  for (int64_t g = 0; g < groups; g++)
    for (int64_t b = 0; b < blocks; b++) {
      uint8_t* to = out + (g * blocks + b) * BLOCK_BYTES;
      std::memset(to, 0, BLOCK_BYTES);
      for (int64_t r = 0; r < ROWS && g * ROWS + r < rows; r++) {
        const int64_t row = g * ROWS + r;
        const uint8_t* from = codes + row * columns / 2 + b * BLOCK / 2;
        for (int k = 0; k < BLOCK; k++) {
          const int half = k / 8, p = k % 2, j = k % 8 / 2;
          to[half * 64 + 4 * r + 2 * p + j / 2] |= (from[k / 2] >> 4 * (k % 2) & 15) << 4 * (j % 2);
        }
        to[CODE_BYTES + r] = scales[row * blocks + b];
      }
    }
}

// Rows first to last (first a multiple of 16) as bfloat16 e2m1 * block_scale [last - first, K]: exact.
void fourfold_unpack(const uint8_t* w, int64_t columns, int64_t first, int64_t last, uint16_t* out) {
  const int64_t blocks = columns / BLOCK;
#pragma omp parallel for
  for (int64_t g = first / ROWS; g < (last + ROWS - 1) / ROWS; g++)
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* from = w + (g * blocks + b) * BLOCK_BYTES;
      for (int64_t r = 0; r < ROWS && g * ROWS + r < last; r++) {
        uint16_t* to = out + (g * ROWS + r - first) * columns + b * BLOCK;
        const float scale = e4m3(from[CODE_BYTES + r]);
        decode_row(load32(from + 4 * r), scale, to);
        decode_row(load32(from + 64 + 4 * r), scale, to + 8);
      }
    }
}

}  // extern "C"
