/*
 * AVX-512 against plain C: masks, permutations, compress and expand, scatter and gather, conversions,
 * bit twiddling. Ends with status 0 if all agree.
 *
 * Build: cc -O2 -static -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -o avx512 avx512.c
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int bad;
static void same(const char *what, const void *a, const void *b, size_t n)
{
    if (memcmp(a, b, n)) {
        printf("%s differs\n", what);
        bad = 1;
    }
}

static uint32_t seed = 1;
static uint32_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

int main(void)
{
    static _Alignas(64) uint32_t table[4096], spread[4096], plain_spread[4096];
    for (int i = 0; i < 4096; i++)
        table[i] = rnd();
    for (int round = 0; round < 200000; round++) {
        _Alignas(64) uint32_t a[16], b[16], x[16], y[16];
        _Alignas(64) double d[8], e[8], f[8], g[8];
        for (int i = 0; i < 16; i++) {
            a[i] = rnd();
            b[i] = rnd();
        }
        __mmask16 m = rnd();
        __m512i va = _mm512_load_si512(a), vb = _mm512_load_si512(b);

        _mm512_store_si512(x, _mm512_mask_add_epi32(va, m, va, vb));
        for (int i = 0; i < 16; i++)
            y[i] = m >> i & 1 ? a[i] + b[i] : a[i];
        same("masked add", x, y, 64);

        _mm512_store_si512(x, _mm512_permutexvar_epi32(vb, va));
        for (int i = 0; i < 16; i++)
            y[i] = a[b[i] & 15];
        same("permute", x, y, 64);

        memset(x, 0, 64), memset(y, 0, 64);
        _mm512_mask_compressstoreu_epi32(x, m, va);
        for (int i = 0, k = 0; i < 16; i++)
            if (m >> i & 1)
                y[k++] = a[i];
        same("compress", x, y, 64);

        _mm512_store_si512(x, _mm512_maskz_expandloadu_epi32(m, b));
        for (int i = 0, k = 0; i < 16; i++)
            y[i] = m >> i & 1 ? b[k++] : 0;
        same("expand", x, y, 64);

        __m512i at = _mm512_and_si512(va, _mm512_set1_epi32(4095));
        _mm512_store_si512(x, _mm512_mask_i32gather_epi32(vb, m, at, table, 4));
        for (int i = 0; i < 16; i++)
            y[i] = m >> i & 1 ? table[a[i] & 4095] : b[i];
        same("gather", x, y, 64);

        _mm512_mask_i32scatter_epi32(spread, m, at, vb, 4);
        for (int i = 0; i < 16; i++)
            if (m >> i & 1)
                plain_spread[a[i] & 4095] = b[i];

        _mm512_store_si512(x, _mm512_ternarylogic_epi32(va, vb, _mm512_rol_epi32(va, 7), 0x96));
        for (int i = 0; i < 16; i++)
            y[i] = a[i] ^ b[i] ^ (a[i] << 7 | a[i] >> 25);
        same("ternary logic", x, y, 64);

        _mm512_store_si512(x, _mm512_lzcnt_epi32(va));
        for (int i = 0; i < 16; i++)
            y[i] = a[i] ? __builtin_clz(a[i]) : 32;
        same("leading zeros", x, y, 64);

        __mmask16 less = _mm512_cmplt_epu32_mask(va, vb), plain = 0;
        for (int i = 0; i < 16; i++)
            plain |= (a[i] < b[i]) << i;
        same("compare", &less, &plain, sizeof plain);

        for (int i = 0; i < 8; i++) {
            d[i] = (int32_t)a[i] * 0.37;
            e[i] = (int32_t)b[i] + 0.5;
        }
        __m512d vd = _mm512_load_pd(d), ve = _mm512_load_pd(e);
        _mm512_store_pd(f, _mm512_mask_div_pd(vd, m, _mm512_mul_pd(vd, ve), _mm512_set1_pd(3)));
        for (int i = 0; i < 8; i++)
            g[i] = m >> i & 1 ? d[i] * e[i] / 3 : d[i];
        same("masked division", f, g, 64);

        _mm512_store_pd(f, _mm512_roundscale_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(va)), 0x10));
        for (int i = 0; i < 8; i++)
            g[i] = (double)(int32_t)a[i];
        same("conversion", f, g, 64);
    }
    same("scatter", spread, plain_spread, sizeof spread);
    puts(bad ? "wrong" : "AVX-512 agrees");
    return bad;
}
