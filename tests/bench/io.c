// Measures a block device inside a guest, past its page cache.
//
//   io DEVICE SECONDS
//
// prints "io NAME RATE" lines: random reads and writes of 4 KiB (a second, one at a time and 16 at a
// time), sequential reads and writes (MiB a second). Every block read must hold what was written.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BIG = 1 << 20, DEPTH = 16 };

static int fd;
static uint64_t blocks;
static double seconds;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

// Fills a buffer with what belongs at block `n`.
static void pattern(uint64_t *buf, size_t bytes, uint64_t n) {
    for (size_t i = 0; i < bytes / 8; i++)
        buf[i] = (n + i / (BLOCK / 8)) * 0x9e3779b97f4a7c15u + i % (BLOCK / 8);
}

static void *buffer(void) {
    void *p = mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    return p;
}

static void sequential(int write) {
    uint64_t *buf = buffer();
    double start = now(), t;
    uint64_t done = 0, per = BIG / BLOCK;
    for (uint64_t n = 0; n + per <= blocks; n += per, done++) {
        if (write) {
            pattern(buf, BIG, n);
            if (pwrite(fd, buf, BIG, n * BLOCK) != BIG) die("write");
        } else {
            if (pread(fd, buf, BIG, n * BLOCK) != BIG) die("read");
            if (buf[0] != n * 0x9e3779b97f4a7c15u) die("contents");
        }
    }
    if (write && fsync(fd)) die("fsync");
    t = now() - start;
    printf("io sequential-%s %.1f\n", write ? "write" : "read", done / t);
}

static uint64_t work(int write, unsigned seed) {
    uint64_t *buf = buffer(), done = 0, x = seed * 2654435761u + 1;
    double end = now() + seconds;
    while (now() < end) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t n = x % blocks;
        if (write) {
            pattern(buf, BLOCK, n);
            if (pwrite(fd, buf, BLOCK, n * BLOCK) != BLOCK) die("write");
        } else {
            if (pread(fd, buf, BLOCK, n * BLOCK) != BLOCK) die("read");
            if (buf[7] != n * 0x9e3779b97f4a7c15u + 7) die("contents");
        }
        done++;
    }
    return done;
}

static void at_random(int write, int depth) {
    uint64_t *counts = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    for (int i = 0; i < depth; i++)
        if (fork() == 0) {
            counts[i] = work(write, i + 1);
            _exit(0);
        }
    for (int i = 0, status; i < depth; i++)
        if (wait(&status) < 0 || status) die("child");
    for (int i = 0; i < depth; i++) sum += counts[i];
    printf("io random-%s-%d %.0f\n", write ? "write" : "read", depth, sum / seconds);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    fd = open(argv[1], O_RDWR | O_DIRECT);
    if (fd < 0) die(argv[1]);
    seconds = atof(argv[2]);
    blocks = lseek(fd, 0, SEEK_END) / BLOCK;
    sequential(1);
    sequential(0);
    at_random(0, 1);
    at_random(0, DEPTH);
    at_random(1, 1);
    at_random(1, DEPTH);
    return 0;
}
