"""The C types of penstock.mailauth.dkim."""

cimport cython

from penstock.mailauth._header cimport Field as CField
from penstock.mailauth._header cimport Header as CHeader
from penstock.mailauth._header cimport decode_base64 as read_base64
from penstock.mailauth._header cimport BodyCanonicalizer as Canonicalizer
from penstock.mailauth._header cimport split_tags, squeeze
from penstock.mailauth.header cimport canonical_domain


cpdef dict parse_tags(bytes value)
cpdef bytes decode_base64(str text)


cdef class Signature:
    cdef readonly CField field
    cdef readonly dict tags
    cdef readonly str domain, selector, question, algorithm, identity_domain
    cdef readonly bytes signature, body_hash
    cdef readonly bint is_relaxed_header, is_relaxed_body
    cdef readonly list names
    cdef readonly object length, expires
    cdef bint _is_arc

    @cython.locals(tags=dict, is_arc=bint)
    cpdef read(self)
    cdef check_policy(self, object now)
    cdef bytes header_digest(self, CHeader header)
    cpdef verify(self, CHeader header, object key)


cpdef verify_digest(object key, bytes signature, bytes digest)
cdef object _number(dict tags, str name)
cpdef object key_of(object answer)


cdef class BodyHashes:
    cdef dict _hashes
    cdef bint _is_finished

    @cython.locals(each=_BodyHash)
    cpdef feed(self, object chunk)
    @cython.locals(each=_BodyHash)
    cpdef finish(self)
    cdef _BodyHash hash_of(self, bint relaxed, object length)


cdef class _BodyHash:
    cdef object _sha, _left
    cdef Canonicalizer canonicalizer
    cdef readonly object total
    cdef readonly bytes digest

    cdef finish(self)


@cython.locals(found=_BodyHash)
cpdef check_body(Signature signature, BodyHashes hashes)


cdef class DkimVerifier:
    cdef CHeader _header
    cdef readonly BodyHashes hashes
    cdef list _signatures
    cdef readonly list questions

    cdef object _verify(self, Signature signature, object answer)


cdef object _parse_signature(CHeader header, CField field, object now)
