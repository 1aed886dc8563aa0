/*
 * Small kernels for comparing processors: native, translated by tandem, translated by others. Each
 * runs a fixed amount of work and prints its name, the seconds it took by the monotonic clock, and
 * a checksum that must be the same everywhere.
 *
 *   kernels                        runs all
 *   kernels NAME...                runs these
 *   kernels --time NAME COMMAND... runs a command; the checksum is one of its standard output
 *
 * Build: cc -O2 -static -o kernels kernels.c -lm
 */
#define _GNU_SOURCE
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static const char *self;

/* The time; with BENCH_CPU=1 the processor time of this process and the children it waited for. */
static double now(void)
{
    struct timespec t;
    const char *cpu = getenv("BENCH_CPU");
    if (cpu && *cpu == '1') {
        struct rusage r;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        getrusage(RUSAGE_CHILDREN, &r);
        return t.tv_sec + t.tv_nsec * 1e-9 + r.ru_utime.tv_sec + r.ru_stime.tv_sec +
            (r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1e-6;
    }
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

#define AXPY(name, ...)                                                                     \
    static __attribute__((noinline, optimize("O3") __VA_ARGS__)) void name(float *y,        \
        const float *x, float a, int n)                                                     \
    {                                                                                       \
        for (int i = 0; i < n; i++)                                                         \
            y[i] += a * x[i];                                                               \
    }
AXPY(axpy)
AXPY(axpy_avx2, , target("avx2"))

static uint64_t saxpy_with(void (*f)(float *, const float *, float, int))
{
    enum { N = 4096 };
    static float x[N], y[N];
    for (int i = 0; i < N; i++) {
        x[i] = i;
        y[i] = 0;
    }
    for (int round = 0; round < 20000; round++)
        f(y, x, 0.5f, N);
    return (uint64_t)y[100];
}

static uint64_t saxpy(void)
{
    return saxpy_with(axpy);
}

static uint64_t saxpy_avx2(void)
{
    return saxpy_with(axpy_avx2);
}

static uint64_t transcendental(void)
{
    double s = 0;
    for (int i = 1; i < 1500000; i++)
        s += sin(i) + exp(-i * 1e-6) + log(i);
    return (uint64_t)s;
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

static uint64_t copy_of(size_t n, int rounds)
{
    char *a = malloc(n), *b = malloc(n);
    memset(a, 1, n);
    for (int i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+r"(n));
        memcpy(b, a, n);
        a[i % n] = b[n - 1 - i % n];
    }
    uint64_t r = a[5] + b[6];
    free(a);
    free(b);
    return r;
}

static uint64_t copy_4k(void)
{
    return copy_of(4096, 2000000);
}

static uint64_t copy_64k(void)
{
    return copy_of(65536, 80000);
}

static uint64_t copy_1m(void)
{
    return copy_of(1 << 20, 3000);
}

static uint64_t copy_16m(void)
{
    return copy_of(16 << 20, 60);
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

static uint64_t fill_of(size_t n, int rounds)
{
    char *a = malloc(n);
    uint64_t r = 0;
    for (int i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+r"(n));
        memset(a, i, n);
        r += a[i % n];
    }
    free(a);
    return r;
}

static uint64_t fill_small(void)
{
    static char a[4096];
    uint64_t sum = 0;
    for (int i = 0; i < 20000000; i++) {
        size_t n = 1 + (i * 7 & 127);
        __asm__ volatile("" : "+r"(n));
        memset(a + (i & 63), i, n);
        sum += a[i & 127];
    }
    return sum;
}

static uint64_t fill_4k(void)
{
    return fill_of(4096, 2000000);
}

static uint64_t fill_1m(void)
{
    return fill_of(1 << 20, 4000);
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

static uint64_t system_call(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 1000000; i++)
        sum += syscall(SYS_getppid) > 0;
    return sum;
}

/* A byte goes to and fro between two processes. */
static uint64_t pipe_switch(void)
{
    int to[2], fro[2];
    char c = 1;
    uint64_t sum = 0;
    if (pipe(to) || pipe(fro))
        return 0;
    pid_t child = fork();
    if (child == 0) {
        close(to[1]);
        while (read(to[0], &c, 1) == 1 && write(fro[1], &c, 1) == 1)
            ;
        _exit(0);
    }
    for (int i = 0; i < 30000; i++) {
        if (write(to[1], &c, 1) != 1 || read(fro[0], &c, 1) != 1)
            break;
        sum += c;
    }
    close(to[1]);
    waitpid(child, 0, 0);
    close(to[0]);
    close(fro[0]);
    close(fro[1]);
    return sum;
}

static uint64_t spawn(void)
{
    char *argv[] = { (char *)self, "--nothing", 0 };
    uint64_t sum = 0;
    for (int i = 0; i < 500; i++) {
        int status = 1;
        pid_t child = fork();
        if (child == 0) {
            execve(self, argv, environ);
            _exit(1);
        }
        waitpid(child, &status, 0);
        sum += status == 0;
    }
    return sum;
}

static uint64_t page_fault(void)
{
    enum { N = 32 << 20 };
    uint64_t sum = 0;
    for (int round = 0; round < 16; round++) {
        char *a = mmap(0, N, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (a == MAP_FAILED)
            return 0;
        madvise(a, N, MADV_NOHUGEPAGE);
        for (int i = 0; i < N; i += 4096)
            a[i] = 1;
        sum += a[N - 4096];
        munmap(a, N);
    }
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*run)(void);
} kernels[] = {
    { "sort", sort_ints },
    { "fib", fib },
    { "sieve", sieve },
    { "chase", chase },
    { "hash", hash },
    { "snprintf", format },
    { "malloc", alloc },
    { "memcpy-small", copy_small },
    { "memcpy-4K", copy_4k },
    { "memcpy-64K", copy_64k },
    { "memcpy-1M", copy_1m },
    { "memcpy-16M", copy_16m },
    { "memset-small", fill_small },
    { "memset-4K", fill_4k },
    { "memset-1M", fill_1m },
    { "matmul", matmul },
    { "saxpy", saxpy },
    { "saxpy-avx2", saxpy_avx2 },
    { "libm", transcendental },
    { "fpdiv", fpdiv },
    { "x87", x87 },
    { "syscall", system_call },
    { "pipe", pipe_switch },
    { "fork-exec", spawn },
    { "page-fault", page_fault },
};

static void report(const char *name, double seconds, uint64_t sum)
{
    printf("kernel %s %.4f %llx\n", name, seconds, (unsigned long long)sum);
    fflush(stdout);
}

/* Runs a command; its standard output becomes the checksum (FNV-1a), mixed with its status. */
static int time_command(const char *name, char **argv)
{
    int out[2], status = 0;
    unsigned char buf[4096];
    ssize_t n;
    uint64_t h = 14695981039346656037u;
    if (pipe(out))
        return 1;
    double t = now();
    pid_t child = fork();
    if (child == 0) {
        dup2(out[1], 1);
        close(out[0]);
        close(out[1]);
        execvp(argv[0], argv);
        _exit(127);
    }
    close(out[1]);
    while ((n = read(out[0], buf, sizeof buf)) > 0)
        for (ssize_t i = 0; i < n; i++)
            h = (h ^ buf[i]) * 1099511628211u;
    waitpid(child, &status, 0);
    report(name, now() - t, h + status);
    return status != 0;
}

int main(int argc, char **argv)
{
    /* Two processes of a pipe on two processors would be another benchmark. */
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    self = argv[0];
    if (argc > 1 && !strcmp(argv[1], "--nothing"))
        return 0;
    if (argc > 3 && !strcmp(argv[1], "--time"))
        return time_command(argv[2], argv + 3);
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        int wanted = argc < 2;
        for (int a = 1; a < argc; a++)
            wanted |= !strcmp(argv[a], kernels[i].name);
        if (!wanted)
            continue;
        seed = 12345;
        double t = now();
        uint64_t sum = kernels[i].run();
        report(kernels[i].name, now() - t, sum);
    }
    return 0;
}
