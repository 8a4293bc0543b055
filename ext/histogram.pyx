"""Histogram with log-linear buckets: fixed memory, 1 % relative error, from one microsecond to one hour.

Theory
------
The octave of a value is the position of its highest bit; the next six bits select one of 64 equal buckets in that
octave. A bucket is therefore at most 1/64 of its values wide, and its middle differs from them by at most 0.8 % (the
idea of Tene's HdrHistogram). The octaves from 2^9 ns to 2^42 ns are kept: 33 x 64 counters, 17 KB.

Rules
-----
1. Values outside the range count as the nearest bound, but the least and the greatest value are kept exactly.
2. A percentile is the value at that rank: the middle of its bucket, limited by the least and the greatest value.
3. Counts are exact; merging two histograms gives the histogram of all their values.
"""

from libc.math cimport ceil
from libc.string cimport memset

LOWEST = HISTOGRAM_LOWEST
HIGHEST = HISTOGRAM_HIGHEST


cdef inline int64_t low_of(int index) noexcept nogil:
    """Return the least value of a bucket."""
    return (<int64_t> 64 + index % 64) << (FIRST_OCTAVE + index // 64 - 6)


cdef inline int64_t width_of(int index) noexcept nogil:
    return (<int64_t> 1) << (FIRST_OCTAVE + index // 64 - 6)


cdef class Histogram:
    """Counts of durations in nanoseconds."""

    def __cinit__(self):
        self.reset()

    cpdef reset(self):
        self.total = 0
        self.sum = 0.0
        self.least = 0
        self.greatest = 0
        memset(self.counts, 0, sizeof(self.counts))

    cpdef record(self, int64_t ns):
        self.add(ns, 1)

    def record_n(self, int64_t ns, int64_t n):
        if n < 0:
            raise ValueError("n must not be negative")
        self.add(ns, n)

    def merge(self, Histogram other not None):
        cdef int i
        if not other.total:
            return
        if not self.total or other.least < self.least:
            self.least = other.least
        if not self.total or other.greatest > self.greatest:
            self.greatest = other.greatest
        self.total += other.total
        self.sum += other.sum
        for i in range(HISTOGRAM_BUCKETS):
            self.counts[i] += other.counts[i]

    @property
    def count(self):
        return self.total

    @property
    def min(self):
        return self.least

    @property
    def max(self):
        return self.greatest

    @property
    def mean(self):
        return self.sum / self.total if self.total else 0.0

    def percentile(self, double p):
        cdef uint64_t rank, seen = 0
        cdef int i
        cdef int64_t middle
        if not 0 <= p <= 100:
            raise ValueError("a percentile must be between 0 and 100")
        if not self.total:
            return 0
        # Rounded first: 0.95 * 20 is slightly above 19 and must not become rank 20.
        rank = <uint64_t> ceil(round(p / 100.0 * self.total, 6))
        if rank <= 1:
            return self.least
        if rank >= self.total:
            return self.greatest
        for i in range(HISTOGRAM_BUCKETS):
            seen += self.counts[i]
            if seen >= rank:
                middle = low_of(i) + width_of(i) // 2
                return max(self.least, min(self.greatest, middle))
        return self.greatest

    def buckets(self):
        cdef int i
        return [
            (low_of(i), low_of(i) + width_of(i), self.counts[i]) for i in range(HISTOGRAM_BUCKETS) if self.counts[i]
        ]

    def to_dict(self):
        cdef int i
        return {
            "unit": "ns",
            "count": self.total,
            "min": self.least,
            "max": self.greatest,
            "sum": self.sum,
            "buckets": [[low_of(i), self.counts[i]] for i in range(HISTOGRAM_BUCKETS) if self.counts[i]],
        }

    @classmethod
    def from_dict(cls, data):
        cdef Histogram made = cls()
        cdef int64_t low, n
        cdef uint64_t total = 0
        cdef int index
        if data["unit"] != "ns":
            raise ValueError(f"the unit of a histogram must be ns, not {data['unit']!r}")
        for low, n in data["buckets"]:
            index = histogram_index(low)
            if low_of(index) != low or n < 0:
                raise ValueError(f"[{low}, {n}] is not a bucket of a histogram")
            made.counts[index] += n
            total += n
        if total != data["count"]:
            raise ValueError(f"the buckets of the histogram count {total}, not {data['count']}")
        made.total = total
        made.sum = data["sum"]
        made.least = data["min"]
        made.greatest = data["max"]
        return made
