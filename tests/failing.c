/* Counts the calls of a process that read or change files below a folder, and has the n-th fail.
 *
 * Loaded before the C library (LD_PRELOAD); tests/failing.py arms it. Nothing is counted before.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* What becomes of the n-th call: it fails once; it and all later ones fail; the process is killed
 * before it; half of a write is made, and it and all later ones fail. */
enum { ONCE, FOR_EVER, KILL, SHORT };

static char folder[PATH_MAX], first[PATH_MAX + 64];
static long count, number;
static int error, mode, reading, armed, log_to = -1;

/* log: a descriptor that is told of each call, -1 for none. */
void failing_arm(const char *path, long at, int with, int how, int reads, int log) {
  snprintf(folder, sizeof folder, "%s", path);
  count = 0, number = at, error = with, mode = how, reading = reads, first[0] = 0, log_to = log,
  armed = 1;
}
void failing_disarm(void) { armed = 0; }
const char *failing_first(void) { return first; }

static int below(const char *path) {
  size_t length = strlen(folder);
  return strncmp(path, folder, length) == 0 && (path[length] == '/' || !path[length]);
}

/* The path of a descriptor; 0 where it is not below the folder. */
static int of(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

/* A name, whose folder must be there, as an absolute path; 0 where it is not below. */
static int named(const char *name, char *path) {
  char parent[PATH_MAX];
  snprintf(parent, sizeof parent, "%s", name);
  char *slash = strrchr(parent, '/');
  char kept[NAME_MAX + 1] = "";
  strncat(kept, slash ? slash + 1 : parent, NAME_MAX);
  if (slash == parent) return 0;
  if (slash) *slash = 0;
  if (!realpath(slash ? parent : ".", path)) return 0;
  size_t length = strlen(path);
  snprintf(path + length, PATH_MAX - length, "/%s", kept);
  return below(path);
}

/* Whether this call fails. */
static int fails(int reads, const char *what, const char *path) {
  if (!armed || reads != reading) return 0;
  count++;
  if (log_to >= 0) dprintf(log_to, "%s %s\n", what, path + strlen(folder));
  if (!number || count < number || (count > number && (mode == ONCE || mode == KILL))) return 0;
  if (count == number) {
    snprintf(first, sizeof first, "%s %s", what, path + strlen(folder));
    if (mode == KILL) {
      dprintf(2, "KILLED %s\n", first);
      kill(getpid(), SIGKILL);
    }
  }
  errno = error;
  return 1;
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define OF(descriptor, reads, what) \
  char path[PATH_MAX]; \
  if (armed && of(descriptor, path) && fails(reads, what, path)) return -1
#define NAMED(name, what) \
  char path[PATH_MAX]; \
  if (armed && named(name, path) && fails(0, what, path)) return -1

ssize_t write(int descriptor, const void *bytes, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  char path[PATH_MAX];
  if (armed && descriptor > 2 && of(descriptor, path)) {
    int now = count + 1 == number && !reading;
    if (fails(0, "write", path))
      return mode == SHORT && now && size > 1 ? real(descriptor, bytes, size / 2) : -1;
  }
  return real(descriptor, bytes, size);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at) {
  REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
  OF(descriptor, 0, "write");
  return real(descriptor, bytes, size, at);
}
ssize_t read(int descriptor, void *bytes, size_t size) {
  REAL(ssize_t, read, int, void *, size_t);
  OF(descriptor, 1, "read");
  return real(descriptor, bytes, size);
}
int fsync(int descriptor) {
  REAL(int, fsync, int);
  OF(descriptor, 0, "fsync");
  return real(descriptor);
}
int ftruncate64(int descriptor, off64_t size) {
  REAL(int, ftruncate64, int, off64_t);
  OF(descriptor, 0, "truncate");
  return real(descriptor, size);
}
int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  NAMED(from, "rename");
  return real(from, to);
}
int unlink(const char *name) {
  REAL(int, unlink, const char *);
  NAMED(name, "unlink");
  return real(name);
}
int mkdir(const char *name, mode_t bits) {
  REAL(int, mkdir, const char *, mode_t);
  NAMED(name, "mkdir");
  return real(name, bits);
}
static int opening(const char *name, int flags) {
  char path[PATH_MAX];
  int reads = !(flags & (O_WRONLY | O_RDWR | O_CREAT));
  return armed && named(name, path) && fails(reads, "open", path);
}
#define OPEN(name) \
  int name(const char *file, int flags, ...) { \
    REAL(int, name, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return opening(file, flags) ? -1 : real(file, flags, bits); \
  }
OPEN(open)
OPEN(open64)
