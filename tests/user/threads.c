/* Threads: many of them, locks, atomics, thread-local storage, signals to one of them. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static atomic_long counted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static long guarded, turn;
static _Thread_local long own;
static atomic_int signals;

static void *work(void *arg) {
    for (int i = 0; i < 5000; i++) {
        counted++;
        own++;
        pthread_mutex_lock(&lock);
        guarded++;
        pthread_mutex_unlock(&lock);
    }
    return (void *)(own + (long)arg);
}
static void *ping(void *arg) {
    long me = (long)arg;
    for (int i = 0; i < 500; i++) {
        pthread_mutex_lock(&lock);
        while (turn % 2 != me) pthread_cond_wait(&moved, &lock);
        turn++;
        pthread_cond_broadcast(&moved);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}
static void on_signal(int s) { (void)s; signals++; }
static void *sleeper(void *arg) {
    while (signals == 0) usleep(100000);
    return arg;
}

int main(void) {
    for (int round = 0; round < 3; round++) {
        pthread_t t[40];
        long sum = 0;
        void *result;
        for (long i = 0; i < 40; i++) pthread_create(&t[i], NULL, work, (void *)i);
        for (int i = 0; i < 40; i++) pthread_join(t[i], &result), sum += (long)result;
        printf("%ld %ld %ld\n", (long)counted, guarded, sum);
    }
    pthread_t a, b;
    pthread_create(&a, NULL, ping, (void *)0);
    pthread_create(&b, NULL, ping, (void *)1);
    pthread_join(a, NULL), pthread_join(b, NULL);
    printf("turns %ld\n", turn);
    signal(SIGUSR1, on_signal);
    pthread_create(&a, NULL, sleeper, NULL);
    while (signals == 0) pthread_kill(a, SIGUSR1), usleep(1000);
    pthread_join(a, NULL);
    puts("the sleeper has woken");
    pthread_create(&a, NULL, work, NULL);
    pthread_detach(a);
    pthread_exit(NULL);
}
