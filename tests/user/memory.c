/* Memory: mappings that come, go and move; code that is written, by the program and by the kernel. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const unsigned char code[] = {0xb8, 0, 0, 0, 0, 0xc3}; /* mov eax, n; ret */
static unsigned char *space;

static int call(void) { return ((int (*)(void))space)(); }
static void *writer(void *arg) {
    for (int i = 0; i < 2000; i++) __atomic_store_n((int *)(space + 1), 1000 + i, __ATOMIC_RELAXED);
    return arg;
}

int main(void) {
    int rwx = PROT_READ | PROT_WRITE | PROT_EXEC, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
    space = mmap(NULL, 8192, rwx, anonymous, -1, 0);
    memcpy(space, code, sizeof code);
    long sum = 0;
    for (int i = 0; i < 300; i++) {
        *(int *)(space + 1) = i;
        sum += call();
    }
    printf("rewritten code: %ld\n", sum);
    /* Data beside the code, by many writes. */
    for (int i = 0; i < 100000; i++) space[4000 + i % 90] += call() & 1;
    printf("data beside it: %d\n", space[4001]);
    /* The kernel writes code. */
    int pipes[2], n = 77;
    if (pipe(pipes) || write(pipes[1], &n, 4) != 4) return 1;
    printf("read: %zd\n", read(pipes[0], space + 1, 4));
    printf("then: %d\n", call());
    mprotect(space, 8192, PROT_READ | PROT_EXEC);
    printf("read only: %d\n", call());
    mprotect(space, 8192, rwx);
    *(int *)(space + 1) = 88;
    printf("writable again: %d\n", call());
    pthread_t t;
    pthread_create(&t, NULL, writer, NULL);
    int last = 0, backwards = 0;
    for (int i = 0; i < 20000; i++) {
        int now = call();
        if (now >= 1000) backwards += now < last, last = now;
    }
    pthread_join(t, NULL);
    printf("backwards: %d, at last %d\n", backwards, call());
    /* Other code at the same place. */
    unsigned char *other = mmap(NULL, 4096, rwx, anonymous, -1, 0);
    memcpy(other, code, sizeof code);
    *(int *)(other + 1) = 99;
    mremap(other, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, space);
    printf("moved: %d\n", call());
    mmap(space, 8192, rwx, anonymous | MAP_FIXED, -1, 0);
    memcpy(space, code, sizeof code);
    printf("mapped anew: %d\n", call());
    madvise(space, 4096, MADV_DONTNEED);
    memcpy(space, code, sizeof code);
    space[1] = 5;
    printf("after DONTNEED: %d\n", call());
    char *end = sbrk(0);
    sbrk(1 << 20);
    memset(end, 1, 1 << 20);
    printf("break: %d\n", sbrk(-(1 << 20)) != (void *)-1 && sbrk(0) == end);
    /* An instruction that overwrites the next one: mov byte [rip+1], 7; mov eax, 1; ret */
    unsigned char self[] = {0xc6, 5, 1, 0, 0, 0, 7, 0xb8, 1, 0, 0, 0, 0xc3};
    memcpy(space + 100, self, sizeof self);
    printf("overwritten in front of itself: %d\n", ((int (*)(void))(space + 100))());
    return 0;
}
