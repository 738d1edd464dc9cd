// One vector type per instruction set, all with the same interface: L output rows in lanes.
//
// A 64-byte half block holds 16 rows of 8 codes, a 32-bit word a row. In the word, 16-bit half p has nibbles
// j = 0..3 of input 2 j + p. So bytes masked to their low nibbles are inputs (0, 4, 1, 5), the high nibbles
// (2, 6, 3, 7); a 16-bit half shifted right by 4 j starts with input 2 j + p.
//
// Weights are twice their E2M1 value, an integer: with a zero point of 12 as bytes (`Bytes`), or signed in 16-bit
// halves times `HALF_UNIT`. Block scales are E4M3 bits read as float16, which makes them 2^-8 of their value.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(FOURFOLD_AVX512_VNNI) || defined(FOURFOLD_AVX2)
#include <immintrin.h>
#endif

namespace fourfold {

constexpr int ROWS = 16, BLOCK = 16, CODE_BYTES = 128, BLOCK_BYTES = CODE_BYTES + ROWS;
constexpr int ZERO_POINT = 12;
constexpr float WEIGHT_UNIT = 0.5f, SCALE_UNIT = 256.0f;

inline int32_t load32(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if defined(FOURFOLD_AVX512_VNNI) || defined(FOURFOLD_AVX2)
// Sixteen codes of activations in the order in which `Lanes::bytes` has the inputs.
inline void byte_order(const int8_t* from, int8_t* to) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), order));
}

// Eight inputs of one row as bfloat16 e2m1 * scale, which is exact.
inline void decode_row(uint32_t word, float scale, uint16_t* out) {
  const __m256i shifts = _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28);
  const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
  const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(INT32_MIN));
  const __m256 value = _mm256_mul_ps(_mm256_permutevar8x32_ps(table, code), _mm256_set1_ps(scale));
  const __m256i bits = _mm256_srli_epi32(_mm256_or_si256(_mm256_castps_si256(value), sign), 16);
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 8);
  _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(pairs));
}
#else
inline void byte_order(const int8_t* from, int8_t* to) {
  for (int k = 0; k < 16; k++) to[k] = from[k / 8 * 8 + k % 8 / 2 + k % 2 * 4];
}

inline void decode_row(uint32_t word, float scale, uint16_t* out) {
  static constexpr float table[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  for (int k = 0; k < 8; k++) {
    const uint32_t code = word >> (16 * (k % 2) + 4 * (k / 2));
    const float value = code & 8 ? -table[code & 7] * scale : table[code & 7] * scale;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out[k] = (uint16_t)(bits >> 16);
  }
}
#endif

#if defined(FOURFOLD_AVX512_VNNI)

struct Lanes {
  static constexpr int L = 16, GROUPS = 2, GROUPS_FROM = 3, HALF_UNIT = 1;
  using Floats = __m512;
  using Ints = __m512i;
  using Bytes = __m512i;
  using Halves = __m512i;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Ints ints(int32_t v) { return _mm512_set1_epi32(v); }
  static Floats scales(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7));
  }
  static void bytes(const uint8_t* p, Bytes out[2]) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i mask = _mm512_set1_epi8(15), v = _mm512_loadu_si512(p);
    out[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(v, mask));
    out[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
  }
  // For each of G groups, four products of 4 inputs each, on top of `start`.
  template <int G>
  static void dot_block(Ints sum[G], int32_t start, const Bytes w[][4], const int32_t* x) {
    for (int g = 0; g < G; g++) sum[g] = ints(start);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      for (int g = 0; g < G; g++) sum[g] = _mm512_dpbusd_epi32(sum[g], w[g][i], _mm512_set1_epi32(x[i]));
  }
  static void halves(const uint8_t* p, Halves out[4]) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m512i v = _mm512_loadu_si512(p);
    out[0] = _mm512_permutexvar_epi16(v, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table);
  }
  static Ints dot_halves(Ints acc, Halves w, int32_t x) { return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x)); }
  // acc + v * x * s
  static Floats add_scaled(Floats acc, Ints v, float x, Floats s) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), _mm512_mul_ps(s, _mm512_set1_ps(x)), acc);
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
};

#elif defined(FOURFOLD_AVX2)

struct Lanes {
  static constexpr int L = 8, GROUPS = 1, GROUPS_FROM = 1, HALF_UNIT = 256;
  using Floats = __m256;
  using Ints = __m256i;
  using Bytes = __m256i;
  using Halves = __m256i;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Ints ints(int32_t v) { return _mm256_set1_epi32(v); }
  static Floats scales(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7));
  }
  static void bytes(const uint8_t* p, Bytes out[2]) {
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i mask = _mm256_set1_epi8(15), v = _mm256_loadu_si256((const __m256i*)p);
    out[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
    out[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
  }
  // Sums of pairs are at most 2 * 24 * 127, so four of them fit 16 bits.
  template <int G>
  static void dot_block(Ints sum[G], int32_t start, const Bytes w[][4], const int32_t* x) {
    for (int g = 0; g < G; g++) {
      Ints pairs = _mm256_maddubs_epi16(w[g][0], ints(x[0]));
      for (int i = 1; i < 4; i++) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[g][i], ints(x[i])));
      sum[g] = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), ints(start));
    }
  }
  // The value lands in the high byte: a sum of 16 products is at most 16 * 12 * 256 * 32767 < 2^31.
  static void halves(const uint8_t* p, Halves out[4]) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i mask = _mm256_set1_epi16(0x0f00), v = _mm256_loadu_si256((const __m256i*)p);
    out[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_slli_epi16(v, 8), mask));
    out[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_slli_epi16(v, 4), mask));
    out[2] = _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
    out[3] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
  }
  static Ints dot_halves(Ints acc, Halves w, int32_t x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, _mm256_set1_epi32(x)));
  }
  static Floats add_scaled(Floats acc, Ints v, float x, Floats s) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_mul_ps(s, _mm256_set1_ps(x)), acc);
  }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
};

#else  // portable: arrays that the compiler vectorises

struct Lanes {
  static constexpr int L = 16, GROUPS = 1, GROUPS_FROM = 1, HALF_UNIT = 1;
  struct Floats { float v[L]; };
  struct Ints { int32_t v[L]; };
  struct Bytes { uint8_t v[4 * L]; };
  struct Halves { int16_t v[2 * L]; };

  static Floats zero() { return Floats{}; }
  static Ints ints(int32_t v) {
    Ints out;
    for (int i = 0; i < L; i++) out.v[i] = v;
    return out;
  }
  static Floats scales(const uint8_t* p) {
    Floats out;
    for (int i = 0; i < L; i++) {
      const uint32_t e = p[i] >> 3, m = p[i] & 7, bits = (e + 112) << 23 | m << 20;  // 2^(e - 15) (1 + m / 8)
      float normal;
      std::memcpy(&normal, &bits, 4);
      out.v[i] = e ? normal : (float)m * 0x1p-17f;
    }
    return out;
  }
  static void bytes(const uint8_t* p, Bytes out[2]) {
    static constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    for (int i = 0; i < 4 * L; i++) {
      out[0].v[i] = table[p[i] & 15];
      out[1].v[i] = table[p[i] >> 4];
    }
  }
  template <int G>
  static void dot_block(Ints sum[G], int32_t start, const Bytes w[][4], const int32_t* x) {
    for (int g = 0; g < G; g++) {
      sum[g] = ints(start);
      for (int i = 0; i < 4; i++) {
        int8_t a[4];
        std::memcpy(a, x + i, 4);
        for (int r = 0; r < L; r++)
          for (int k = 0; k < 4; k++) sum[g].v[r] += w[g][i].v[4 * r + k] * a[k];
      }
    }
  }
  static void halves(const uint8_t* p, Halves out[4]) {
    static constexpr int16_t table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (int i = 0; i < 2 * L; i++)
      for (int j = 0; j < 4; j++) out[j].v[i] = table[(p[2 * i] | p[2 * i + 1] << 8) >> 4 * j & 15];
  }
  static Ints dot_halves(Ints acc, Halves w, int32_t x) {
    int16_t a[2];
    std::memcpy(a, &x, 4);
    for (int r = 0; r < L; r++) acc.v[r] += w.v[2 * r] * a[0] + w.v[2 * r + 1] * a[1];
    return acc;
  }
  static Floats add_scaled(Floats acc, Ints v, float x, Floats s) {
    for (int r = 0; r < L; r++) acc.v[r] += (float)v.v[r] * (x * s.v[r]);
    return acc;
  }
  static void store(float* p, Floats v) { std::memcpy(p, v.v, sizeof v.v); }
};

#endif

}  // namespace fourfold
