"""Functions of the plain grammar that other compiled modules call."""

cdef object of_type(object type, tuple items)
cpdef object plain_mail(bytes argument, bint esmtp, bint eightbitmime, unsigned long long max_size)
cpdef object plain_recipient(bytes argument)
cpdef object plain_hello(bytes argument)
