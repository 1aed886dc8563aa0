/* Signals: faults with their registers, handlers that change them, alternate stacks, masks, calls that
   signals end. What it prints does not depend on where it is loaded. */
#define _GNU_SOURCE
#include <fenv.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile int count;
static char *page;

static void fault(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    long addr = (long)info->si_addr;
    long offset = addr - (long)page;
    const char *where = addr == r[REG_RIP] ? "rip" : offset >= 0 && offset < 8192 ? "page" : "abs";
    printf("signal %d code %d at %s %ld trap %lld error %#llx\n", signal, info->si_code, where,
           *where == 'p' ? offset : *where == 'a' ? addr : 0, (long long)r[REG_TRAPNO],
           (long long)r[REG_ERR]);
    siglongjmp(back, 1);
}
static void counted(int signal) { (void)signal; count++; }
static void skip(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    r[REG_RIP] += 2;
    r[REG_RAX] = 42;
}
static void on_alternate(int signal) {
    char here;
    stack_t now;
    sigaltstack(NULL, &now);
    char *low = now.ss_sp;
    printf("signal %d on the alternate stack: %d, flags %d\n", signal,
           &here >= low && &here < low + now.ss_size, now.ss_flags);
}
static void handle(int signal, void (*f)(int), int flags) {
    struct sigaction a = {.sa_handler = f, .sa_flags = flags};
    sigaction(signal, &a, NULL);
}
static void inspect(int signal, void (*f)(int, siginfo_t *, void *)) {
    struct sigaction a = {.sa_sigaction = f, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(signal, &a, NULL);
}
#define TRY(what) if (!sigsetjmp(back, 1)) { what; }

int main(void) {
    setvbuf(stdout, NULL, _IONBF, 0);
    page = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int faults[] = {SIGSEGV, SIGFPE, SIGILL, SIGBUS, SIGTRAP};
    for (int i = 0; i < 5; i++) inspect(faults[i], fault);
    TRY(*(volatile int *)0x10 = 1)
    TRY(printf("%d\n", *(volatile int *)0x20))
    TRY(*page = 1)
    TRY(__atomic_fetch_add((int *)(page + 8), 1, __ATOMIC_SEQ_CST))
    TRY(memset(page + 100, 0, 5000))
    TRY(volatile int zero = 0; printf("%d\n", 1 / zero))
    TRY(asm volatile("ud2"))
    TRY(asm volatile("int3"))
    TRY(asm volatile("hlt"))
    TRY(asm volatile("mov (%0), %%rax" ::"r"(0x8000000000000000ul) : "rax"))
    TRY(((void (*)(void))page)())
    TRY(memset((void *)0x1000, 0, 5000))

    inspect(SIGILL, skip);
    long rax = 7;
    asm volatile("ud2" : "+a"(rax));
    printf("the handler has made it %ld\n", rax);

    handle(SIGUSR1, counted, 0);
    for (int i = 0; i < 1000; i++) raise(SIGUSR1);
    printf("%d of 1000\n", count);
    stack_t alternate = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&alternate, NULL);
    handle(SIGUSR2, on_alternate, SA_ONSTACK);
    raise(SIGUSR2);

    handle(SIGALRM, counted, 0);
    count = 0;
    alarm(1);
    pause();
    printf("alarms: %d\n", count);

    sigset_t set, old, pending;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, &old);
    count = 0;
    kill(getpid(), SIGUSR1);
    sigpending(&pending);
    printf("blocked: %d, pending %d\n", count, sigismember(&pending, SIGUSR1));
    sigsuspend(&old);
    printf("after sigsuspend: %d\n", count);
    sigprocmask(SIG_SETMASK, &old, NULL);

    int pipes[2], status;
    char byte;
    if (pipe(pipes)) return 1;
    for (int restart = 0; restart < 2; restart++) {
        pid_t child = fork();
        if (!child) {
            usleep(200000);
            kill(getppid(), SIGUSR1);
            usleep(200000);
            if (write(pipes[1], "x", 1) != 1) _exit(1);
            _exit(5);
        }
        handle(SIGUSR1, counted, restart ? SA_RESTART : 0);
        count = 0;
        long n = read(pipes[0], &byte, 1);
        printf("read %ld, signals %d\n", n, count);
        waitpid(child, &status, 0);
        printf("child %d\n", WEXITSTATUS(status));
        if (n != 1 && read(pipes[0], &byte, 1) != 1) return 1;
    }
    pid_t child = fork();
    if (!child) {
        signal(SIGTERM, SIG_DFL);
        raise(SIGTERM);
    }
    waitpid(child, &status, 0);
    printf("ended by %d\n", WTERMSIG(status));

    feenableexcept(FE_DIVBYZERO);
    volatile double one = 1, none = 0;
    TRY(printf("%f\n", one / none))
    return 0;
}
