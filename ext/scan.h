/* Scanning message text, one pass at memory speed.
 *
 * Mail is dull: almost every 64 octets hold nothing but text and proper CRLFs. `scan_text` therefore skips dull blocks
 * of 64 octets with vector compares and looks at single octets only in a block that may hold something of interest:
 *
 *   - a dot at the start of a line, that is after CR LF (RFC 5321 4.5.2: stuffing, or the end of the data),
 *   - a LF without a CR before it, a CR without a LF after it (RFC 5321 2.3.8: neither may occur alone),
 *   - a NUL (RFC 5322 4: obsolete, and software in C may end the text there),
 *   - the first octet by which a line is longer than the limit (RFC 5321 4.5.3.1.6).
 *
 * The octet loop alone decides what is of interest; the vectors only say "nothing here for sure". That is what makes
 * the answer the same for any split of the input, and the vectors a mere matter of speed.
 *
 * Rules:
 *   - the octet before p[0] is not a CR (a CR at the end of the input is left to the next call), and a dot at p[0]
 *     is not looked at: the caller knows whether p[0] starts a line and has handled it;
 *   - `column` is the number of octets of the line before p[0]; on return, before the octet at `at`.
 */
#ifndef PENSTOCK_SCAN_H
#define PENSTOCK_SCAN_H

#include <stddef.h>
#include <stdint.h>

enum {
    SCAN_MORE = 0,    /* nothing more: at == n, or n - 1 when the last octet is a CR whose fellow is still to come */
    SCAN_DOT = 1,     /* a dot at the start of a line */
    SCAN_BARE_LF = 2,
    SCAN_BARE_CR = 3,
    SCAN_NUL = 4,
    SCAN_LONG = 5     /* the line has reached its limit and the octet at `at` is not the CR that ends it */
};

#define SCAN_BIT(kind) (1u << (kind))

typedef struct {
    size_t at;
    size_t column;
    int kind;
} scan_result;

#if defined(__SSE2__) && !defined(PENSTOCK_NO_SIMD)
#include <emmintrin.h>
#define SCAN_HAS_VECTORS 1

static inline uint64_t scan_mask64(const unsigned char *p, char octet)
{
    const __m128i wanted = _mm_set1_epi8(octet);
    uint64_t a = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)p), wanted));
    uint64_t b = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(p + 16)), wanted));
    uint64_t c = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(p + 32)), wanted));
    uint64_t d = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(p + 48)), wanted));
    return a | b << 16 | c << 32 | d << 48;
}

/* Octets of 13 and below: one compare finds the blocks with neither CR, LF nor NUL. */
static inline uint64_t scan_low64(const unsigned char *p)
{
    const __m128i top = _mm_set1_epi8(13);
    uint64_t mask = 0;
    for (int k = 0; k < 4; k++) {
        __m128i octets = _mm_loadu_si128((const __m128i *)(p + 16 * k));
        uint64_t low = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(octets, top), octets));
        mask |= low << (16 * k);
    }
    return mask;
}

/* Say whether the 64 octets at p[i] hold nothing of interest, and if so move the column over them. */
static inline int scan_is_dull(const unsigned char *p, size_t i, size_t n, size_t *column, size_t limit,
                               unsigned report)
{
    const unsigned char *q = p + i;
    const uint64_t after_cr = i > 0 && p[i - 1] == '\r';
    const uint64_t after_crlf = i > 1 && p[i - 1] == '\n' && p[i - 2] == '\r';
    if (after_crlf && q[0] == '.')
        return 0;
    const uint64_t low = scan_low64(q);
    if (low == 0 && !after_cr) {
        *column += 64;
        return *column <= limit;
    }
    const uint64_t lf = scan_mask64(q, '\n');
    const uint64_t cr = scan_mask64(q, '\r');
    const uint64_t expected = cr << 1 | after_cr; /* where a LF is required, and allowed */
    const uint64_t dots = (lf & expected) << 1;
    if (expected ^ lf) /* a bare LF, or a bare CR */
        return 0;
    if (q[63] == '\r' && i + 64 < n && q[64] != '\n') /* a bare CR that the next block would not see */
        return 0;
    if (dots != 0 && (dots & scan_mask64(q, '.')))
        return 0;
    if ((low & ~(lf | cr)) != 0 && (report & SCAN_BIT(SCAN_NUL)) && scan_mask64(q, '\0'))
        return 0;
    if (lf == 0) {
        *column += 64;
        return *column <= limit;
    }
    if (*column + (size_t)__builtin_ctzll(lf) > limit)
        return 0; /* close to the limit: the octet loop decides (it undoes nothing, the column was not moved) */
    *column = (size_t)__builtin_clzll(lf);
    return 1;
}
#else
#define SCAN_HAS_VECTORS 0
#endif

/* Find the first octet of interest. `report` has the SCAN_BIT of each kind to report. */
static inline scan_result scan_text(const unsigned char *p, size_t n, size_t column, size_t limit, unsigned report,
                                    int vectors)
{
    scan_result r;
    size_t i = 0;
    (void)vectors;
    while (i < n) {
        size_t end = n - i < 64 ? n : i + 64;
#if SCAN_HAS_VECTORS
        if (vectors && n - i >= 64) {
            size_t moved = column;
            if (scan_is_dull(p, i, n, &moved, limit, report)) {
                column = moved;
                i = end;
                continue;
            }
        }
#endif
        for (; i < end; i++) {
            const unsigned char c = p[i];
            if (c == '\n') {
                if ((i == 0 || p[i - 1] != '\r') && (report & SCAN_BIT(SCAN_BARE_LF))) {
                    r.kind = SCAN_BARE_LF;
                    goto found;
                }
                column = 0;
                continue;
            }
            if (c == '\r') {
                if (i + 1 == n) {
                    r.kind = SCAN_MORE;
                    goto found;
                }
                if (p[i + 1] != '\n' && (report & SCAN_BIT(SCAN_BARE_CR))) {
                    r.kind = SCAN_BARE_CR;
                    goto found;
                }
                column++;
                continue;
            }
            if (c == '.' && i > 1 && p[i - 1] == '\n' && p[i - 2] == '\r' && (report & SCAN_BIT(SCAN_DOT))) {
                r.kind = SCAN_DOT;
                goto found;
            }
            if (c == '\0' && (report & SCAN_BIT(SCAN_NUL))) {
                r.kind = SCAN_NUL;
                goto found;
            }
            if (column >= limit && (report & SCAN_BIT(SCAN_LONG))) {
                r.kind = SCAN_LONG;
                goto found;
            }
            column++;
        }
    }
    r.kind = SCAN_MORE;
    if (n > 0 && p[n - 1] == '\r') { /* a dull block ended the input with a CR */
        i = n - 1;
        column--;
    }
found:
    r.at = i;
    r.column = column;
    return r;
}

#endif
