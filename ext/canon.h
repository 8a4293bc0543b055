/* The relaxed canonical form of a body (RFC 6376 3.4.4), for the stretches of text that need no state.
 *
 * Octets are copied 16 at a time, whatever they are; a vector compare finds the first one that may not stay as it is: a
 * control, a space before another blank or a line end. Only that one is looked at. A line end is copied here when
 * neither a blank nor another line end follows, so that nothing has to be remembered; everything else, and everything
 * at the end of the input, is left to the caller.
 *
 * Where the processor can compress octets under a mask (AVX-512 VBMI2), 64 are done together without a look at single
 * ones: masks say which blanks go. There, empty lines are written as they come; those at the end are taken back.
 */
#ifndef PENSTOCK_CANON_H
#define PENSTOCK_CANON_H

#include <stddef.h>
#include <stdint.h>

#if defined(__SSE2__) && !defined(PENSTOCK_NO_SIMD)
#include <emmintrin.h>

static inline int canon_is_blank(unsigned char c) { return c == ' ' || c == '\t'; }

/* Write the relaxed form of the start of p to `out`, which has space for `room` octets. p[0] is neither a blank nor a
 * CR. Return how many octets of p were read, and in *written how many were written. */
static size_t canon_relax(const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written)
{
    const __m128i spaces = _mm_set1_epi8(' ');
    size_t i = 0, o = 0, end;
    while (i + 17 <= n && o + 16 <= room) {
        __m128i octets = _mm_loadu_si128((const __m128i *)(p + i));
        __m128i next = _mm_loadu_si128((const __m128i *)(p + i + 1));
        __m128i space = _mm_cmpeq_epi8(octets, spaces);
        __m128i low = _mm_cmpeq_epi8(_mm_max_epu8(octets, spaces), spaces);
        __m128i low_next = _mm_cmpeq_epi8(_mm_max_epu8(next, spaces), spaces);
        /* low, and not a space before something that is not low */
        unsigned stop = (unsigned)_mm_movemask_epi8(_mm_andnot_si128(_mm_andnot_si128(low_next, space), low));
        _mm_storeu_si128((__m128i *)(out + o), octets);
        if (stop == 0) {
            i += 16;
            o += 16;
            continue;
        }
        i += (size_t)__builtin_ctz(stop);
        o += (size_t)__builtin_ctz(stop);
        if (canon_is_blank(p[i])) {
            for (end = i + 1; end < n && canon_is_blank(p[end]); end++)
                ;
            if (end + 1 >= n)
                break;
            if (p[end] != '\r') {
                out[o++] = ' ';
                i = end;
                continue;
            }
            if (p[end + 1] != '\n')
                break;
            i = end; /* blanks before a line end are dropped */
        }
        if (p[i] != '\r') { /* another control */
            out[o++] = p[i++];
            continue;
        }
        if (i + 2 >= n || o + 2 > room || p[i + 1] != '\n' || p[i + 2] == '\r' || canon_is_blank(p[i + 2]))
            break;
        out[o++] = '\r';
        out[o++] = '\n';
        i += 2;
    }
    *written = o;
    return i;
}
#else
#define CANON_NO_VECTORS
static size_t canon_relax(const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written)
{
    (void)p, (void)n, (void)out, (void)room;
    *written = 0;
    return 0;
}
#endif

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 8) && !defined(CANON_NO_VECTORS)
#include <immintrin.h>

static int canon_is_wide(void) { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2"); }

/* As `canon_relax`. *line_ends is how many line ends come after what was written. */
__attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))
static size_t canon_relax_wide(
    const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written, size_t *line_ends)
{
    const __m512i spaces = _mm512_set1_epi8(' '), tabs = _mm512_set1_epi8('\t');
    const __m512i crs = _mm512_set1_epi8('\r'), lfs = _mm512_set1_epi8('\n');
    const uint64_t last = (uint64_t)1 << 63;
    size_t i = 0, o = 0, ends = 0;
    while (i + 66 <= n && o + 64 <= room) {
        __m512i octets = _mm512_loadu_si512(p + i);
        const unsigned char *next = p + i + 64;
        uint64_t tab = _mm512_cmpeq_epi8_mask(octets, tabs);
        uint64_t blank = _mm512_cmpeq_epi8_mask(octets, spaces) | tab;
        uint64_t lf = _mm512_cmpeq_epi8_mask(octets, lfs);
        uint64_t end = _mm512_cmpeq_epi8_mask(octets, crs) & (lf >> 1 | (next[0] == '\n' ? last : 0));
        uint64_t next_blank = blank >> 1 | (canon_is_blank(next[0]) ? last : 0);
        uint64_t next_end = end >> 1 | (next[0] == '\r' && next[1] == '\n' ? last : 0);
        uint64_t kept = ~(blank & (next_blank | next_end)); /* a blank stays before what is neither */
        size_t step = 64;
        if (end & last) { /* the CR and the LF stay together */
            kept &= ~last;
            step = 63;
        }
        octets = _mm512_mask_mov_epi8(octets, tab, spaces);
        _mm512_storeu_si512(out + o, _mm512_maskz_compress_epi8(kept, octets));
        o += (size_t)__builtin_popcountll(kept);
        i += step;
    }
    for (; o >= 2 && out[o - 2] == '\r' && out[o - 1] == '\n'; o -= 2)
        ends++;
    *written = o;
    *line_ends = ends;
    return i;
}
#else
static int canon_is_wide(void) { return 0; }
static size_t canon_relax_wide(
    const unsigned char *p, size_t n, unsigned char *out, size_t room, size_t *written, size_t *line_ends)
{
    *line_ends = 0;
    return canon_relax(p, n, out, room, written);
}
#endif
#endif
