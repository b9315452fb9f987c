/* A disk that remembers: a file on a FUSE filesystem of its own, for a loop device to stand on.

       powerdisk DIRECTORY BYTES

   It mounts itself at DIRECTORY, where there are two files. "disk" is the disk: every write, discard and flush of it is
   logged, with its data, in the order in which it came. What a program writes to "mark" is logged between them, so that
   it is known what was written and flushed when a call was acknowledged.

   The disk has three layers, the upper ones copy-on-write: what it was to begin with, what is on it for certain, and what
   may be, together with all that is written while that is looked at. Commands come on stdin, a line each, and each is
   answered by a line; powerdisk.py knows them. It ends when its filesystem is mounted nowhere any more. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SECTOR 512
#define MAX_WRITE (1 << 20)
#define ARENA (1ull << 36) /* of addresses; only what is used is memory */
enum { ROOT = FUSE_ROOT_ID, DISK, MARK };
enum { FIRST, CERTAIN, POSSIBLE, LAYERS };

static void die(const char *what) { perror(what); exit(1); }

static void *reserve(uint64_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) die("mmap");
    return at;
}

/* ---------------------------------------------------------------------------------------------- the disk */

static uint64_t size;
static char *layer[LAYERS];
static unsigned char *has[LAYERS]; /* for each sector */

struct entry { char kind; uint64_t offset, length, data; }; /* w: write, d: discard, f: flush, m: mark */
static struct entry *entries;
static uint64_t count;
static char *arena;
static uint64_t used;
static int recording;

/* Which writes fail with EIO: those that hold this, or the one with this number, or (the same) flushes. */
static char pattern[256];
static size_t pattern_length;
static long fail_write, fail_flush;
static int keep_failing;
static uint64_t failed;

static int top(uint64_t sector)
{
    int l = POSSIBLE;
    while (l > FIRST && !has[l][sector]) l--;
    return l;
}

static void read_disk(char *to, uint64_t offset, uint64_t length)
{
    for (uint64_t done = 0; done < length; ) {
        uint64_t at = offset + done, sector = at / SECTOR, run = SECTOR - at % SECTOR;
        int l = top(sector);
        while (done + run < length && top(++sector) == l) run += SECTOR;
        if (run > length - done) run = length - done;
        memcpy(to + done, layer[l] + at, run);
        done += run;
    }
}

/* data is NULL for zeroes. */
static void write_layer(int l, const char *data, uint64_t offset, uint64_t length)
{
    uint64_t first = offset / SECTOR, end = (offset + length + SECTOR - 1) / SECTOR;
    if (offset % SECTOR && !has[l][first]) {
        char whole[SECTOR];
        read_disk(whole, first * SECTOR, SECTOR);
        memcpy(layer[l] + first * SECTOR, whole, SECTOR);
    }
    if ((offset + length) % SECTOR && !has[l][end - 1]) {
        char whole[SECTOR];
        read_disk(whole, (end - 1) * SECTOR, SECTOR);
        memcpy(layer[l] + (end - 1) * SECTOR, whole, SECTOR);
    }
    if (data) memcpy(layer[l] + offset, data, length);
    else memset(layer[l] + offset, 0, length);
    memset(has[l] + first, 1, end - first);
}

static void clear_layer(int l) { memset(has[l], 0, size / SECTOR); }

static void log_entry(char kind, const char *data, uint64_t offset, uint64_t length)
{
    if (!recording) return;
    entries[count++] = (struct entry){kind, offset, length, used};
    if (data) {
        memcpy(arena + used, data, length);
        used += length;
    }
}

static int fails(long *countdown)
{
    if (*countdown <= 0) return 0;
    if (--*countdown > 0) return 0;
    if (keep_failing) *countdown = 1;
    failed++;
    return 1;
}

static int disk_write(const char *data, uint64_t offset, uint64_t length)
{
    if (offset + length > size) return EIO;
    if (pattern_length && data && memmem(data, length, pattern, pattern_length)) {
        failed++;
        return EIO;
    }
    if (fails(&fail_write)) return EIO;
    log_entry(data ? 'w' : 'd', data, offset, length);
    write_layer(recording ? CERTAIN : POSSIBLE, data, offset, length);
    return 0;
}

/* ------------------------------------------------------------------------------------------------- FUSE */

static int fuse;

static void reply(uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header out = {sizeof out + length, -error, unique};
    struct iovec parts[] = {{&out, sizeof out}, {(void *)data, length}};
    /* ENOENT: the request was interrupted, and nobody waits for it. */
    if (writev(fuse, parts, length ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV) die("answer");
}

static struct fuse_attr attributes(uint64_t node)
{
    struct fuse_attr attr = {.ino = node, .nlink = 1, .blksize = 4096};
    attr.mode = node == ROOT ? S_IFDIR | 0700 : S_IFREG | 0600;
    attr.size = node == DISK ? size : 0;
    attr.blocks = attr.size / 512;
    return attr;
}

static void handle(char *request)
{
    struct fuse_in_header *in = (void *)request;
    void *arg = request + sizeof *in;
    switch (in->opcode) {
    case FUSE_INIT: {
        struct fuse_init_in *init = arg;
        struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION};
        out.max_readahead = init->max_readahead;
        out.flags = init->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES);
        out.max_background = 64;
        out.congestion_threshold = 48;
        out.max_write = MAX_WRITE;
        out.max_pages = MAX_WRITE / 4096;
        out.time_gran = 1;
        reply(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_LOOKUP: {
        uint64_t node = !strcmp(arg, "disk") ? DISK : !strcmp(arg, "mark") ? MARK : 0;
        if (!node) {
            reply(in->unique, ENOENT, NULL, 0);
            return;
        }
        struct fuse_entry_out out = {.nodeid = node, .attr = attributes(node)};
        reply(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_GETATTR:
    case FUSE_SETATTR: {
        struct fuse_attr_out out = {.attr = attributes(in->nodeid)};
        reply(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
        struct fuse_open_out out = {.open_flags = in->opcode == FUSE_OPEN ? FOPEN_DIRECT_IO : 0};
        reply(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_READ: {
        static char data[MAX_WRITE];
        struct fuse_read_in *read = arg;
        uint64_t end = in->nodeid == DISK ? size : 0, length = read->size;
        if (read->offset >= end) length = 0;
        else if (length > end - read->offset) length = end - read->offset;
        read_disk(data, read->offset, length);
        reply(in->unique, 0, data, length);
        return;
    }
    case FUSE_WRITE: {
        struct fuse_write_in *write = arg;
        struct fuse_write_out out = {.size = write->size};
        int error = 0;
        if (in->nodeid == MARK) log_entry('m', (char *)(write + 1), 0, write->size);
        else error = disk_write((char *)(write + 1), write->offset, write->size);
        reply(in->unique, error, &out, error ? 0 : sizeof out);
        return;
    }
    case FUSE_FALLOCATE: {
        struct fuse_fallocate_in *range = arg;
        if (!(range->mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))) reply(in->unique, EOPNOTSUPP, NULL, 0);
        else reply(in->unique, disk_write(NULL, range->offset, range->length), NULL, 0);
        return;
    }
    case FUSE_FSYNC:
        if (in->nodeid == DISK) {
            if (fails(&fail_flush)) {
                reply(in->unique, EIO, NULL, 0);
                return;
            }
            log_entry('f', NULL, 0, 0);
        }
        reply(in->unique, 0, NULL, 0);
        return;
    case FUSE_STATFS: {
        struct fuse_statfs_out out = {.st = {.bsize = 4096, .namelen = 255, .frsize = 4096}};
        reply(in->unique, 0, &out, sizeof out);
        return;
    }
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_DESTROY:
        reply(in->unique, 0, NULL, 0);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return; /* nobody waits for an answer */
    default:
        reply(in->unique, ENOSYS, NULL, 0);
    }
}

/* --------------------------------------------------------------------------------------------- commands */

static void tell_log(uint64_t from)
{
    for (uint64_t i = from; i < count; i++) {
        struct entry *e = &entries[i];
        printf("%c %llu %llu", e->kind, (unsigned long long)e->offset, (unsigned long long)e->length);
        if (e->kind == 'm') printf(" %.*s", (int)e->length, arena + e->data);
        putchar('\n');
    }
}

/* Some sectors of a logged write. */
static void redo(int l, uint64_t number, uint64_t from, uint64_t to)
{
    struct entry *e = &entries[number];
    if (number >= count || (e->kind != 'w' && e->kind != 'd')) return;
    uint64_t start = from * SECTOR, end = to * SECTOR < e->length ? to * SECTOR : e->length;
    if (start < end) write_layer(l, e->kind == 'w' ? arena + e->data + start : NULL, e->offset + start, end - start);
}

static void command(char *line)
{
    unsigned long long a = 0, b = 0, c = 0;
    char word[32] = "", text[256] = "";
    sscanf(line, "%31s", word);
    sscanf(line, "%*s %llu %llu %llu", &a, &b, &c);
    if (!strcmp(word, "record")) { /* from what it was to begin with */
        clear_layer(CERTAIN);
        clear_layer(POSSIBLE);
        madvise(arena, used, MADV_DONTNEED);
        count = used = 0;
        recording = 1;
    } else if (!strcmp(word, "keep")) { /* as it is now, that is how it is to begin with */
        for (uint64_t s = 0; s < size / SECTOR; s++)
            if (top(s) != FIRST) memcpy(layer[FIRST] + s * SECTOR, layer[top(s)] + s * SECTOR, SECTOR);
        clear_layer(CERTAIN);
        clear_layer(POSSIBLE);
        recording = 0;
    } else if (!strcmp(word, "rewind")) { /* nothing of the log is on it */
        clear_layer(CERTAIN);
        clear_layer(POSSIBLE);
        recording = 0;
    } else if (!strcmp(word, "certain")) { /* A B: these entries are */
        for (uint64_t i = a; i < b; i++) redo(CERTAIN, i, 0, UINT64_MAX / SECTOR);
    } else if (!strcmp(word, "clear")) {
        clear_layer(POSSIBLE);
    } else if (!strcmp(word, "put")) { /* N FROM TO: these sectors of an entry may be */
        redo(POSSIBLE, a, b, c);
    } else if (!strcmp(word, "log")) { /* FROM */
        tell_log(a);
    } else if (!strcmp(word, "fail")) { /* WRITE FLUSH KEEP: the number of the one that fails, from now on */
        fail_write = a;
        fail_flush = b;
        keep_failing = c;
    } else if (!strcmp(word, "spoil")) { /* TEXT: writes that hold it fail; without: none */
        sscanf(line, "%*s %255s", text);
        pattern_length = strlen(text);
        memcpy(pattern, text, pattern_length);
    } else if (!strcmp(word, "failed")) {
        printf("%llu\n", (unsigned long long)failed);
        fflush(stdout);
        failed = 0;
        return;
    } else {
        puts("unknown");
        fflush(stdout);
        return;
    }
    puts("ok");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: powerdisk DIRECTORY BYTES\n", stderr);
        return 2;
    }
    size = strtoull(argv[2], NULL, 10);
    for (int l = 0; l < LAYERS; l++) {
        layer[l] = reserve(size);
        has[l] = reserve(size / SECTOR);
    }
    arena = reserve(ARENA);
    entries = reserve(ARENA);
    fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fuse < 0) die("/dev/fuse");
    char options[128];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fuse, MAX_WRITE);
    if (mount("powerdisk", argv[1], "fuse", MS_NOSUID | MS_NODEV, options)) die("mount");
    /* Leave the namespace of the tests: who is the last in it unmounts, as it ends, what lies on this disk, and would
       wait for itself (a killed process closes /dev/fuse only after that), and every sync(2) of the machine with it. */
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) || umount2("/", MNT_DETACH))
        die("leave the mount namespace");


    static char request[MAX_WRITE + 65536];
    static char lines[1 << 16];
    size_t held = 0;
    for (int begun = 0, input = 0;;) {
        struct pollfd wait[] = {{fuse, POLLIN, 0}, {input, POLLIN, 0}};
        if (poll(wait, 2, -1) < 0 && errno != EINTR) die("poll");
        if (wait[0].revents) {
            ssize_t got = read(fuse, request, sizeof request);
            if (got < 0 && errno == ENODEV) return 0; /* unmounted */
            if (got < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN) die("read");
            if (got > 0) {
                handle(request);
                if (!begun) {
                    puts("ready");
                    fflush(stdout);
                    begun = 1;
                }
            }
        } else if (wait[1].revents) {
            ssize_t got = read(0, lines + held, sizeof lines - held);
            if (got <= 0) {
                input = -1; /* nobody commands any more */
                continue;
            }
            held += got;
            char *start = lines, *end;
            while ((end = memchr(start, '\n', lines + held - start))) {
                *end = 0;
                command(start);
                start = end + 1;
            }
            held -= start - lines;
            memmove(lines, start, held);
        }
    }
}
