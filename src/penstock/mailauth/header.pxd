"""The C types of penstock.mailauth.header."""

from penstock.mailauth._header cimport Header as CHeader


cpdef tuple author_domains(CHeader header)
cpdef str canonical_domain(str domain)
