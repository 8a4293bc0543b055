"""What other compiled modules may do with a histogram, at the price of a few instructions."""

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #define HISTOGRAM_BUCKETS (33 * 64)
    #define HISTOGRAM_LOWEST 1000LL
    #define HISTOGRAM_HIGHEST 3600000000000LL
    #define FIRST_OCTAVE 9
    static inline int histogram_index(long long ns)
    {
        int octave;
        if (ns < HISTOGRAM_LOWEST) ns = HISTOGRAM_LOWEST;
        if (ns > HISTOGRAM_HIGHEST) ns = HISTOGRAM_HIGHEST;
        octave = 63 - __builtin_clzll((unsigned long long)ns);
        return (octave - FIRST_OCTAVE) * 64 + (int)((ns >> (octave - 6)) & 63);
    }
    """
    const int HISTOGRAM_BUCKETS
    const int64_t HISTOGRAM_LOWEST
    const int64_t HISTOGRAM_HIGHEST
    const int FIRST_OCTAVE
    int histogram_index(int64_t ns) nogil


cdef class Histogram:
    cdef uint64_t total
    cdef double sum
    cdef int64_t least
    cdef int64_t greatest
    cdef uint64_t counts[2112]

    cpdef reset(self)
    cpdef record(self, int64_t ns)

    cdef inline void add(self, int64_t ns, uint64_t n) noexcept nogil:
        """Count n durations, given in nanoseconds."""
        if n == 0:
            return
        if self.total == 0 or ns < self.least:
            self.least = ns
        if self.total == 0 or ns > self.greatest:
            self.greatest = ns
        self.total += n
        self.sum += <double> ns * <double> n
        self.counts[histogram_index(ns)] += n
