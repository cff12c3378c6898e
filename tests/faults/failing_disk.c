/* Between a process and its disk: counts what is written, synced, created, renamed and removed below
 * a folder, and at one of these kills the process, or answers as a failing disk does. Preloaded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, BROKEN, SHORT, READ_ONLY };
enum { GROWS = 1, WRITES = 2 };

static char below[4096];
static int mode = COUNT;
static long at = -1, seen = 0, failed = 0;

void fault_arm(const char *folder, int how, long nth) {
  snprintf(below, sizeof below, "%s", folder);
  mode = how;
  at = nth;
  seen = failed = 0;
}
long fault_seen(void) { return seen; }
long fault_failed(void) { return failed; }

static int inside(const char *path) {
  return below[0] && strncmp(path, below, strlen(below)) == 0;
}

static int of_fd(int fd) {
  char link[64], path[4096];
  if (!below[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return inside(path);
}

static int of_path(int dir, const char *path) {
  if (!below[0]) return 0;
  if (path[0] == '/') return inside(path);
  char whole[8192];
  char link[64];
  if (dir == AT_FDCWD) {
    if (!getcwd(whole, 4096)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, whole, 4095);
    if (n < 0) return 0;
    whole[n] = 0;
  }
  strcat(whole, "/");
  strncat(whole, path, sizeof whole - strlen(whole) - 1);
  return inside(whole);
}

/* 0: go on; -1: errno is set; 1: write less. */
static int step(int kind) {
  long now = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
  if (mode == KILL && now == at) kill(getpid(), SIGKILL);
  int fails = (mode == FULL && now >= at && (kind & GROWS)) || (mode == BROKEN && now == at) ||
              (mode == READ_ONLY && now >= at);
  if (fails) {
    __atomic_add_fetch(&failed, 1, __ATOMIC_SEQ_CST);
    errno = mode == FULL ? ENOSPC : mode == BROKEN ? EIO : EROFS;
    return -1;
  }
  if (mode == SHORT && now == at && (kind & WRITES)) {
    __atomic_add_fetch(&failed, 1, __ATOMIC_SEQ_CST);
    return 1;
  }
  return 0;
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
  NEXT(write);
  if (of_fd(fd)) {
    int how = step(GROWS | WRITES);
    if (how < 0) return -1;
    if (how > 0 && size > 1) size /= 2;
  }
  return next(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
  NEXT(pwrite64);
  if (of_fd(fd)) {
    int how = step(GROWS | WRITES);
    if (how < 0) return -1;
    if (how > 0 && size > 1) size /= 2;
  }
  return next(fd, data, size, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  NEXT(writev);
  if (of_fd(fd)) {
    int how = step(GROWS | WRITES);
    if (how < 0) return -1;
    if (how > 0 && count > 1) count = 1;
  }
  return next(fd, parts, count);
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
  NEXT(copy_file_range);
  if (of_fd(to)) {
    int how = step(GROWS | WRITES);
    if (how < 0) return -1;
    if (how > 0 && size > 1) size /= 2;
  }
  return next(from, a, to, b, size, flags);
}
ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
  ssize_t (*next)(int, int, off64_t *, size_t) =
      (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
  if (of_fd(to)) {
    int how = step(GROWS | WRITES);
    if (how < 0) return -1;
    if (how > 0 && size > 1) size /= 2;
  }
  return next(to, from, place, size);
}
int ftruncate64(int fd, off64_t size) {
  NEXT(ftruncate64);
  if (of_fd(fd) && step(GROWS) < 0) return -1;
  return next(fd, size);
}
int fsync(int fd) {
  NEXT(fsync);
  if (of_fd(fd) && step(GROWS) < 0) return -1;
  return next(fd);
}
int fdatasync(int fd) {
  NEXT(fdatasync);
  if (of_fd(fd) && step(GROWS) < 0) return -1;
  return next(fd);
}

#define OPENS(name, dir, ...) \
  mode_t rights = 0; \
  if (flags & O_CREAT) { \
    va_list rest; \
    va_start(rest, flags); \
    rights = va_arg(rest, mode_t); \
    va_end(rest); \
  } \
  NEXT(name); \
  if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && of_path(dir, path) && step(GROWS) < 0) return -1; \
  return next(__VA_ARGS__, rights)

int open(const char *path, int flags, ...) { OPENS(open, AT_FDCWD, path, flags); }
int open64(const char *path, int flags, ...) { OPENS(open64, AT_FDCWD, path, flags); }
int openat(int dir, const char *path, int flags, ...) { OPENS(openat, dir, dir, path, flags); }
int openat64(int dir, const char *path, int flags, ...) { OPENS(openat64, dir, dir, path, flags); }

int rename(const char *from, const char *to) {
  NEXT(rename);
  if ((of_path(AT_FDCWD, from) || of_path(AT_FDCWD, to)) && step(0) < 0) return -1;
  return next(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  NEXT(renameat);
  if ((of_path(a, from) || of_path(b, to)) && step(0) < 0) return -1;
  return next(a, from, b, to);
}
int mkdir(const char *path, mode_t rights) {
  NEXT(mkdir);
  if (of_path(AT_FDCWD, path) && step(GROWS) < 0) return -1;
  return next(path, rights);
}
int symlink(const char *to, const char *path) {
  NEXT(symlink);
  if (of_path(AT_FDCWD, path) && step(GROWS) < 0) return -1;
  return next(to, path);
}
int unlink(const char *path) {
  NEXT(unlink);
  if (of_path(AT_FDCWD, path) && step(0) < 0) return -1;
  return next(path);
}
int unlinkat(int dir, const char *path, int flags) {
  NEXT(unlinkat);
  if (of_path(dir, path) && step(0) < 0) return -1;
  return next(dir, path, flags);
}
int rmdir(const char *path) {
  NEXT(rmdir);
  if (of_path(AT_FDCWD, path) && step(0) < 0) return -1;
  return next(path);
}
int utimensat(int dir, const char *path, const struct timespec times[2], int flags) {
  NEXT(utimensat);
  if (of_path(dir, path) && step(0) < 0) return -1;
  return next(dir, path, times, flags);
}
