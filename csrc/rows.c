/* Reads and checks the rows of a batch without Python's interpreter lock: lsep/data/native.py loads this with ctypes.
 *
 * Optional: without a C compiler lsep/data/store.py does the same, row by row.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FINE = 0, CANNOT_OPEN = 1, SHORT = 2, DAMAGED = 3, NOT_FINITE = 4, RESIZED = 5 };

static uint32_t table[16][256];

/* zlib's crc32, sixteen bytes a step: table[k][b] is byte b followed by k zero bytes. */
__attribute__((constructor)) static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 16; k++) table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 255];
}

static uint32_t crc_table(uint32_t c, const uint8_t *p, int64_t n) {
    for (; n >= 16; n -= 16, p += 16) {
        uint32_t w[4];
        memcpy(w, p, 16);
        w[0] ^= c;
        c = 0;
        for (int k = 0; k < 4; k++)
            c ^= table[15 - 4 * k][w[k] & 255] ^ table[14 - 4 * k][w[k] >> 8 & 255] ^
                 table[13 - 4 * k][w[k] >> 16 & 255] ^ table[12 - 4 * k][w[k] >> 24];
    }
    for (; n > 0; n--) c = c >> 8 ^ table[0][(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define FOLD(x, k, y) \
    _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)), y)

/* Carry-less products fold 64 bytes a step: Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ,
 * Intel 2009, whose constants for this polynomial these are. n is a multiple of 16 and at least 64. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t crc_folded(uint32_t c, const uint8_t *p, int64_t n) {
    const __m128i by64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i last = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0), *v = (const __m128i *)p;
    __m128i x[4], t;
    for (int k = 0; k < 4; k++) x[k] = _mm_loadu_si128(v++);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)c));
    for (n -= 64; n >= 64; n -= 64)
        for (int k = 0; k < 4; k++) x[k] = FOLD(x[k], by64, _mm_loadu_si128(v++));
    for (int k = 1; k < 4; k++) x[0] = FOLD(x[0], by16, x[k]);
    for (; n >= 16; n -= 16) x[0] = FOLD(x[0], by16, _mm_loadu_si128(v++));
    t = _mm_xor_si128(_mm_srli_si128(x[0], 8), _mm_clmulepi64_si128(x[0], by16, 0x10));
    t = _mm_xor_si128(_mm_srli_si128(t, 4), _mm_clmulepi64_si128(_mm_and_si128(t, low), last, 0x00));
    __m128i q = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(t, low), barrett, 0x10), low);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(t, _mm_clmulepi64_si128(q, barrett, 0x00)), 1);
}
#endif

uint32_t lsep_crc32(const uint8_t *p, int64_t n) {
    uint32_t c = ~0u;
#if defined(__x86_64__)
    if (n >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        int64_t whole = n & ~(int64_t)15;
        c = crc_folded(c, p, whole);
        p += whole, n -= whole;
    }
#endif
    return ~crc_table(c, p, n);
}

/* An exponent of all ones is infinity or not a number. */
#if defined(__x86_64__) && defined(__GNUC__)
#define VECTORISED __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#define VECTORISED
#endif

VECTORISED static int finite16(const uint16_t *p, int64_t n) {
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (p[i] & 0x7C00u) == 0x7C00u;
    return !bad;
}

VECTORISED static int finite32(const uint32_t *p, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (p[i] & 0x7F800000u) == 0x7F800000u;
    return !bad;
}

/* Row i is `size` bytes at offsets[i] of fds[i], or of the file paths[i] where fds[i] < 0, which must have
 * sizes[i] bytes; it goes to out + i * size. A file is not opened through a link, and a pipe is not waited for.
 * crc: expected checksums, or NULL. item: bytes of a value; those of two or four are floats and must be finite.
 * Returns the first bad row, its reason, and in *found the bytes read, the checksum or errno; n when all are fine. */
int64_t lsep_read_rows(const int32_t *fds, char *const *paths, const int64_t *offsets, const int64_t *sizes,
                       int64_t n, int64_t size, uint8_t *out, const uint32_t *crc, int32_t item, int32_t *reason, int64_t *found) {
    for (int64_t i = 0; i < n; i++, out += size) {
        int fd = fds[i];
        if (fd < 0) {
            struct stat is;
            fd = open(paths[i], O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
            if (fd < 0) {
                *reason = CANNOT_OPEN, *found = errno;
                return i;
            }
            if (fstat(fd, &is) || !S_ISREG(is.st_mode) || is.st_size != sizes[i]) {
                *reason = RESIZED, *found = is.st_size;
                close(fd);
                return i;
            }
        }
        int64_t got = 0;
        while (got < size) {
            ssize_t more = pread(fd, out + got, (size_t)(size - got), offsets[i] + got);
            if (more < 0 && errno == EINTR) continue;
            if (more <= 0) break;
            got += more;
        }
        if (fds[i] < 0) close(fd);
        *reason = FINE;
        if (got < size)
            *reason = SHORT, *found = got;
        else if (crc && (*found = lsep_crc32(out, size)) != crc[i])
            *reason = DAMAGED;
        else if ((item == 2 && !finite16((const uint16_t *)out, size / 2)) ||
                 (item == 4 && !finite32((const uint32_t *)out, size / 4)))
            *reason = NOT_FINITE;
        if (*reason != FINE) return i;
    }
    return n;
}
