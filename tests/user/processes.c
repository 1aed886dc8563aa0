/* Processes: fork, vfork, posix_spawn, exec, exit statuses, pipes between them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IONBF, 0);
    if (argc > 1) {
        printf("executed as %s with %s, A is %s\n", strrchr(argv[0], '/') ? "a path" : argv[0], argv[1],
               getenv("A") ? getenv("A") : "not set");
        return 9;
    }
    char me[4096] = {0};
    if (readlink("/proc/self/exe", me, sizeof me - 1) < 0) return 1;
    printf("I am %s\n", strrchr(me, '/') + 1);
    int status, sum = 0;
    for (int i = 0; i < 100; i++) {
        pid_t p = fork();
        if (!p) _exit(i);
        waitpid(p, &status, 0);
        sum += WEXITSTATUS(status);
    }
    printf("children said %d\n", sum);
    pid_t p = fork();
    if (!p) {
        char *args[] = {"other", "one", NULL}, *env[] = {"A=b", NULL};
        execve(me, args, env);
        _exit(1);
    }
    waitpid(p, &status, 0);
    printf("execve: %d\n", WEXITSTATUS(status));
    volatile int seen = 0;
    p = vfork();
    if (!p) {
        seen = 1;
        execl("/no/such/file", "x", NULL);
        seen = errno;
        _exit(3);
    }
    waitpid(p, &status, 0);
    printf("vfork: the child left %d and ended with %d\n", seen, WEXITSTATUS(status));
    char *args[] = {"spawned", "two", NULL};
    int spawned = posix_spawn(&p, me, NULL, NULL, args, environ);
    waitpid(p, &status, 0);
    printf("posix_spawn: %d\n", spawned);
    printf("it ended with %d\n", WEXITSTATUS(status));
    printf("posix_spawn of nothing: %d\n", posix_spawn(&p, "/no/such/file", NULL, NULL, args, environ));
    FILE *f = popen("echo from a shell; exit 4", "r");
    char line[100] = {0};
    if (fgets(line, sizeof line, f)) fputs(line, stdout);
    printf("pclose: %d\n", WEXITSTATUS(pclose(f)));
    char text[200] = {0};
    int fd = open("/proc/self/cmdline", O_RDONLY);
    if (read(fd, text, sizeof text - 1) > 0) printf("cmdline: %s\n", strrchr(text, '/') + 1);
    return 0;
}
