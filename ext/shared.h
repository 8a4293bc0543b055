/* Memory that several processes read and one writes, and a keyed hash: see shared.pyx. */
#ifndef PENSTOCK_SHARED_H
#define PENSTOCK_SHARED_H

#include <stdint.h>
#include <time.h>
static inline uint64_t load64(const uint64_t *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
static inline void store64(uint64_t *at, uint64_t value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
static inline uint64_t acquire64(const uint64_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static inline void publish64(uint64_t *at, uint64_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
static inline int swap64(uint64_t *at, uint64_t *seen, uint64_t value)
{
    return __atomic_compare_exchange_n(at, seen, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint64_t add64(uint64_t *at, int64_t value) { return __atomic_add_fetch(at, value, __ATOMIC_RELAXED); }
static inline int64_t shared_clock(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}
static inline int half_octave(uint64_t value)
{
    int octave = 63 - __builtin_clzll(value | 1);
    return octave * 2 + (octave > 0 ? (int)((value >> (octave - 1)) & 1) : 0);
}
#define ROTATE(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define ROUND \
    v0 += v1; v1 = ROTATE(v1, 13); v1 ^= v0; v0 = ROTATE(v0, 32); v2 += v3; v3 = ROTATE(v3, 16); v3 ^= v2; \
    v0 += v3; v3 = ROTATE(v3, 21); v3 ^= v0; v2 += v1; v1 = ROTATE(v1, 17); v1 ^= v2; v2 = ROTATE(v2, 32);
static inline uint64_t siphash13(uint64_t k0, uint64_t k1, unsigned char kind, const unsigned char *in, size_t size)
{
    uint64_t v0 = 0x736f6d6570736575ULL ^ k0, v1 = 0x646f72616e646f6dULL ^ k1;
    uint64_t v2 = 0x6c7967656e657261ULL ^ k0, v3 = 0x7465646279746573ULL ^ k1;
    uint64_t last = (uint64_t)(size & 0xff) << 56, m;
    size_t i;
    v3 ^= kind; ROUND; v0 ^= kind;
    for (; size >= 8; in += 8, size -= 8) {
        __builtin_memcpy(&m, in, 8);
        v3 ^= m; ROUND; v0 ^= m;
    }
    for (i = 0; i < size; i++) last |= (uint64_t)in[i] << (8 * i);
    v3 ^= last; ROUND; v0 ^= last;
    v2 ^= 0xff; ROUND; ROUND; ROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}

#endif
