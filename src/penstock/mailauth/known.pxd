"""The C types of penstock.mailauth.known."""

cimport cython

from penstock.mailauth._header cimport Header as CHeader
from penstock.mailauth.dkim cimport BodyHashes as CBodyHashes
from penstock.mailauth.dkim cimport DkimVerifier as CDkimVerifier


cdef class KnownCheck:
    cdef object _settings
    cdef readonly CHeader header
    cdef readonly tuple authors
    cdef readonly str author
    cdef readonly Py_ssize_t from_fields
    cdef readonly bint asks_dmarc
    cdef readonly list questions
    cdef readonly CBodyHashes _hashes
    cdef readonly CDkimVerifier _dkim
    cdef object _arc

    cpdef feed(self, object chunk)
    @cython.locals(answers=dict, dkim=list, author=str)
    cpdef finish_known(self, object cached, object told)
    cpdef list verify(self, dict answers)
    @cython.locals(field=bytes)
    cpdef conclude(self, dict answers, list dkim, object found, object told)
    @cython.locals(methods=list)
    cdef list _methods(self, list dkim, object found, object arc, object told)
    cdef tuple _trust_in(self, object arc)
