/* The floor: a plain tar written to a directory with the system calls that it takes and nothing else.

       floor DIR TAR

   It trusts the archive, which bench/layers.py has made: ustar with directories before what is in them, files,
   symlinks, and pax headers of which only xattrs count. Directories get their times when all is written. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define CHECK(call) do { if ((call) < 0) { perror(#call); exit(1); } } while (0)

struct late { char *path; struct timespec times[2]; struct late *next; };

static unsigned long octal(const char *field) { return strtoul(field, NULL, 8); }

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: floor DIR TAR\n", stderr);
        return 2;
    }
    int top, tar, here;
    CHECK(top = open(argv[1], O_RDONLY | O_DIRECTORY));
    CHECK(tar = open(argv[2], O_RDONLY));
    here = top;
    char open_path[4096] = "";
    struct late *late = NULL;
    static char buffer[256 * 1024];
    size_t have = 0, at = 0;
    char *xattrs = NULL;
    size_t xattrs_size = 0;
    umask(0);

    for (;;) {
        if (have - at < 512) {
            memmove(buffer, buffer + at, have - at);
            have -= at;
            at = 0;
            while (have < 512) {
                ssize_t got;
                CHECK(got = read(tar, buffer + have, sizeof buffer - have));
                if (got == 0)
                    goto end;
                have += got;
            }
        }
        char header[512];
        memcpy(header, buffer + at, 512);
        at += 512;
        if (!header[0])
            break;
        char path[300], name[101];
        snprintf(name, sizeof name, "%.100s", header);
        if (header[345])
            snprintf(path, sizeof path, "%.155s/%s", header + 345, name);
        else
            strcpy(path, name);
        size_t size = octal(header + 124), left = size, padded = (size + 511) & ~511UL;
        mode_t mode = octal(header + 100);
        uid_t uid = octal(header + 108);
        gid_t gid = octal(header + 116);
        struct timespec times[2] = {{octal(header + 136), 0}, {octal(header + 136), 0}};
        char type = header[156];
        size_t length = strlen(path);
        if (length && path[length - 1] == '/')
            path[--length] = 0;
        int fd = -1;
        char *base = path;
        if (type != 'x') {
            char *slash = strrchr(path, '/');
            size_t parent = slash ? (size_t)(slash - path) : 0;
            base = slash ? slash + 1 : path;
            if (strlen(open_path) != parent || strncmp(open_path, path, parent)) {
                if (here != top)
                    close(here);
                memcpy(open_path, path, parent);
                open_path[parent] = 0;
                here = top;
                if (parent)
                    CHECK(here = openat(top, open_path, O_RDONLY | O_DIRECTORY));
            }
        }
        if (type == '0')
            CHECK(fd = openat(here, base, O_WRONLY | O_CREAT | O_EXCL, mode));
        if (type == 'x') {
            xattrs = realloc(xattrs, size + 1);
            xattrs_size = size;
        }
        size_t done = 0;
        while (padded) {
            if (at == have) {
                ssize_t got;
                CHECK(got = read(tar, buffer, sizeof buffer));
                have = got;
                at = 0;
            }
            size_t piece = have - at < padded ? have - at : padded;
            size_t data = piece < left ? piece : left;
            if (fd >= 0 && data)
                CHECK(write(fd, buffer + at, data));
            else if (type == 'x')
                memcpy(xattrs + done, buffer + at, data);
            at += piece;
            padded -= piece;
            left -= data;
            done += data;
        }
        if (type == 'x')
            continue;
        if (type == '5') {
            CHECK(mkdirat(here, base, mode));
            if (uid || gid)
                CHECK(fchownat(here, base, uid, gid, 0));
            struct late *one = malloc(sizeof *one);
            one->path = strdup(path);
            memcpy(one->times, times, sizeof times);
            one->next = late;
            late = one;
        } else if (type == '2') {
            char target[101];
            snprintf(target, sizeof target, "%.100s", header + 157);
            CHECK(symlinkat(target, here, base));
            if (uid || gid)
                CHECK(fchownat(here, base, uid, gid, AT_SYMLINK_NOFOLLOW));
            CHECK(utimensat(here, base, times, AT_SYMLINK_NOFOLLOW));
        } else {
            if (uid || gid)
                CHECK(fchown(fd, uid, gid));
            for (size_t i = 0; i < xattrs_size;) {
                size_t record = strtoul(xattrs + i, NULL, 10);
                char *key = memchr(xattrs + i, ' ', record) + 1, *equals = memchr(key, '=', record);
                if (!strncmp(key, "SCHILY.xattr.", 13)) {
                    *equals = 0;
                    CHECK(fsetxattr(fd, key + 13, equals + 1, xattrs + i + record - 1 - (equals + 1), 0));
                }
                i += record;
            }
            CHECK(futimens(fd, times));
            close(fd);
        }
        xattrs_size = 0;
    }
end:
    for (; late; late = late->next)
        CHECK(utimensat(top, late->path, late->times, 0));
    return 0;
}
