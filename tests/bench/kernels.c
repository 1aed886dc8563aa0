/*
 * Small compute kernels for comparing processors: native, translated by tandem, translated by
 * others. Each runs a fixed amount of work and prints its name, the seconds it took by the
 * monotonic clock, and a checksum that must be the same everywhere.
 *
 *   kernels            runs all
 *   kernels NAME...    runs these
 *
 * Build: cc -O2 -static -o kernels kernels.c
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint32_t seed;
static uint32_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

static int cmp_int(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static uint64_t sort_ints(void)
{
    enum { N = 1000000 };
    int *v = malloc(N * sizeof *v);
    uint64_t sum = 0;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++)
            v[i] = (int)rnd();
        qsort(v, N, sizeof *v, cmp_int);
        sum += (uint32_t)v[N / 2];
    }
    free(v);
    return sum;
}

static __attribute__((noinline)) uint64_t fib_of(unsigned n)
{
    return n < 2 ? n : fib_of(n - 1) + fib_of(n - 2);
}

static uint64_t fib(void)
{
    return fib_of(35);
}

static uint64_t sieve(void)
{
    enum { N = 5000000 };
    unsigned char *v = malloc(N);
    uint64_t primes = 0;
    for (int round = 0; round < 8; round++) {
        memset(v, 1, N);
        for (int i = 2; (long)i * i < N; i++)
            if (v[i])
                for (int j = i * i; j < N; j += i)
                    v[j] = 0;
        for (int i = 2; i < N; i++)
            primes += v[i];
    }
    free(v);
    return primes;
}

static uint64_t matmul(void)
{
    enum { N = 128 };
    static double a[N][N], b[N][N], c[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = i + j;
            b[i][j] = i - j;
        }
    for (int round = 0; round < 40; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double s = 0;
                for (int k = 0; k < N; k++)
                    s += a[i][k] * b[k][j];
                c[i][j] += s;
            }
    return (uint64_t)(int64_t)c[17][42];
}

static __attribute__((noinline, optimize("O3"))) void axpy(float *y, const float *x, float a, int n)
{
    for (int i = 0; i < n; i++)
        y[i] += a * x[i];
}

static uint64_t saxpy(void)
{
    enum { N = 4096 };
    static float x[N], y[N];
    for (int i = 0; i < N; i++) {
        x[i] = i;
        y[i] = 0;
    }
    for (int round = 0; round < 20000; round++)
        axpy(y, x, 0.5f, N);
    return (uint64_t)y[100];
}

static uint64_t chase(void)
{
    enum { N = 4 << 20 >> 3 };
    uint64_t *v = malloc(N * sizeof *v);
    for (int i = 0; i < N; i++)
        v[i] = i;
    for (int i = N - 1; i > 0; i--) {
        int j = rnd() % i;
        uint64_t t = v[i];
        v[i] = v[j];
        v[j] = t;
    }
    uint64_t at = 0;
    for (int i = 0; i < 20000000; i++)
        at = v[at];
    free(v);
    return at;
}

static uint64_t hash(void)
{
    uint32_t h = 2166136261u;
    for (uint32_t i = 0; i < 60000000; i++) {
        h ^= i & 0xff;
        h *= 16777619u;
        h = h << 5 | h >> 27;
    }
    return h;
}

static uint64_t copy(void)
{
    enum { N = 1 << 20 };
    char *a = malloc(N), *b = malloc(N);
    memset(a, 1, N);
    for (int i = 0; i < 3000; i++) {
        memcpy(b, a, N);
        a[i] = b[N - 1 - i];
    }
    uint64_t r = a[5] + b[6];
    free(a);
    free(b);
    return r;
}

static uint64_t copy_small(void)
{
    static char a[4096], b[4096];
    uint64_t sum = 0;
    for (int i = 0; i < 20000000; i++) {
        size_t n = 1 + (i * 7 & 127);
        __asm__ volatile("" : "+r"(n));
        memcpy(b + (i & 63), a, n);
        sum += b[i & 127];
    }
    return sum;
}

static uint64_t fill(void)
{
    enum { N = 1 << 20 };
    char *a = malloc(N);
    uint64_t r = 0;
    for (int i = 0; i < 4000; i++) {
        memset(a, i, N);
        r += a[i];
    }
    free(a);
    return r;
}

static uint64_t format(void)
{
    char buf[128];
    uint64_t sum = 0;
    for (int i = 0; i < 2000000; i++)
        sum += snprintf(buf, sizeof buf, "%d %s %x %5.2f", i, "item", i * 3, i * 0.25);
    return sum;
}

static uint64_t fpdiv(void)
{
    double x = 1.0;
    for (int i = 0; i < 30000000; i++)
        x = 1.0 / (x + 1.0);
    return (uint64_t)(x * 1e15);
}

static uint64_t x87(void)
{
    long double x = 1.0L, y = 0.0L;
    for (int i = 0; i < 10000000; i++) {
        y += x * 1.0000001L;
        x = x / 1.0000002L + 0.1L;
    }
    return (uint64_t)y;
}

static uint64_t alloc(void)
{
    enum { SLOTS = 1000 };
    static void *slot[SLOTS];
    uint64_t sum = 0;
    for (int i = 0; i < 6000000; i++) {
        int k = rnd() % SLOTS;
        free(slot[k]);
        slot[k] = malloc(16 + (rnd() & 255));
        sum += (uintptr_t)slot[k] & 8;
    }
    for (int k = 0; k < SLOTS; k++)
        free(slot[k]);
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*run)(void);
} kernels[] = {
    { "sort", sort_ints }, { "fib", fib },         { "sieve", sieve },   { "matmul", matmul },
    { "saxpy", saxpy },    { "chase", chase },     { "hash", hash },     { "memcpy-1M", copy },
    { "memcpy-small", copy_small }, { "memset-1M", fill }, { "snprintf", format },
    { "fpdiv", fpdiv },    { "x87", x87 },         { "malloc", alloc },
};

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        int wanted = argc < 2;
        for (int a = 1; a < argc; a++)
            wanted |= !strcmp(argv[a], kernels[i].name);
        if (!wanted)
            continue;
        seed = 12345;
        double t = now();
        uint64_t sum = kernels[i].run();
        printf("kernel %s %.4f %llx\n", kernels[i].name, now() - t, (unsigned long long)sum);
        fflush(stdout);
    }
    return 0;
}
