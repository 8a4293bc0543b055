"""Creates many files at once: written, made durable together, then renamed into place.

A batch is one call that gives the interpreter lock up once. Done file by file in Python, each of the six system calls
of a file takes the lock again, in competition with the loop that serves the clients.

Steps
-----
1. Each file is written into the first folder of its pair (`tmp` of a Maildir).
2. All are synced. If they are many, by one syncfs(2); if that fails, or would wait for much that others have written,
   the kernel is told to start writing all of them, and each is synced. Only this says which file has failed: Linux
   reports a failed write once to every descriptor opened before it.
3. Only then are files renamed into the second folder (`new`), and each of these folders is synced once.

Steps 1 and 2 are done for some files at a time, whose descriptors are then closed: a batch needs at most MOST_OPEN
descriptors, and one for each file system. If the process has fewer left, it does with what there is.

The files of a group are created all or none. One group's failure does not affect the others.
"""

from libc.errno cimport EINTR, EIO, EMFILE, ENAMETOOLONG, ENFILE, errno
from libc.stdio cimport FILE, fclose, fgets, fopen, snprintf, sscanf
from libc.stdlib cimport calloc, free

import os as _os
import sys as _sys


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <limits.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #ifndef __linux__
    #define SYNC_FILE_RANGE_WRITE 0
    static int syncfs(int fd) { errno = ENOSYS; return -1; }
    static int sync_file_range(int fd, off_t from, off_t octets, unsigned flags) { return 0; }
    #endif
    """
    const int SYNC_FILE_RANGE_WRITE
    const int O_RDONLY, O_DIRECTORY, O_CLOEXEC, O_WRONLY, O_CREAT, O_EXCL, IOV_MAX, AT_FDCWD
    ctypedef long off_t
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct stat_t "stat":
        unsigned long st_dev
    int open(const char *path, int flags, ...) nogil
    int close(int fd) nogil
    int renameat(int folder, const char *name, int new_folder, const char *new_name) nogil
    int unlink(const char *path) nogil
    int fsync(int fd) nogil
    int fdatasync(int fd) nogil
    int syncfs(int fd) nogil
    int sync_file_range(int fd, off_t start, off_t octets, unsigned flags) nogil
    int fstat(int fd, stat_t *found) nogil
    ssize_t writev(int fd, const iovec *pieces, int count) nogil


cdef enum:
    MANY = 4
    # Files, or folders, from which on one syncfs is used instead of a sync of each.
    MOST_DIRTY_KIB = 65536
    # KiB that wait to be written by all programs, up to which syncfs is used: it would wait for all of them.
    MOST_OPEN = 256
    # Files whose descriptors are open at the same time.
    MOST_DEVICES = 8
    # File systems that syncfs is used for; folders of more are synced one by one.
    PATH_OCTETS = 4096
    # PATH_MAX of Linux, with the NUL.


def _version(text):
    return tuple(int(part) if part.isdecimal() else 0 for part in text.partition("-")[0].split(".")[:2])


cdef bint syncfs_reports_errors = _sys.platform == "linux" and _version(_os.uname().release) >= (5, 8)


cdef struct Device:
    unsigned long number
    int fd
    # Of a folder on it, opened before anything is written: a descriptor learns of failed writes only from then on.


cdef struct Folder:
    const char *unfinished_path
    const char *finished_path
    int error
    bint is_changed


cdef struct File:
    int folder
    int group
    const char *name
    iovec *pieces
    int count
    int fd
    bint is_there
    bint is_renamed


cdef struct Batch:
    Folder *folders
    int folder_count
    File *files
    int file_count
    iovec *pieces
    int *errors
    # By group: the error number of the first failure, 0 without one.
    int group_count
    Device[MOST_DEVICES] devices
    int device_count
    bint has_more_devices
    # Than there are places.


def publish(list folders, list files, int groups, bint is_synced):
    """Create files in folders. Return a list with an error number for each group of files, 0 if it was created.

    `folders` has pairs of paths: where files are written, and where they are renamed to. `files` has tuples: the number
    of the pair, the number of the group, the name, and the content as a list of bytes; or, if the unfinished file has
    been written already, its descriptor, which is closed, or -1 if it has been synced and closed. With `is_synced`,
    what is created is on stable storage. Releases the interpreter lock. If a file of a group could not be created, none
    of its files is left behind.
    """
    cdef Batch batch
    cdef Py_ssize_t most = 0
    cdef list keep = []
    for _, _, _, content in files:
        most += len(content) if type(content) is list else 0
    batch.folder_count, batch.file_count, batch.group_count = len(folders), len(files), groups
    batch.device_count = batch.has_more_devices = 0
    batch.folders = <Folder *> calloc(max(1, len(folders)), sizeof(Folder))
    batch.files = <File *> calloc(max(1, len(files)), sizeof(File))
    batch.pieces = <iovec *> calloc(max(1, most), sizeof(iovec))
    batch.errors = <int *> calloc(max(1, groups), sizeof(int))
    try:
        if batch.folders == NULL or batch.files == NULL or batch.pieces == NULL or batch.errors == NULL:
            raise MemoryError
        fill(&batch, folders, files, keep)
        with nogil:
            create(&batch, is_synced)
        return [batch.errors[group] for group in range(groups)]
    finally:
        free(batch.folders)
        free(batch.files)
        free(batch.pieces)
        free(batch.errors)


cdef int fill(Batch *batch, list folders, list files, list keep) except -1:
    """Describe the batch in C. `keep` gets what has to live as long as it."""
    cdef Py_ssize_t at = 0
    cdef int number
    cdef File *file
    cdef bytes piece
    for number in range(batch.folder_count):
        unfinished, finished = folders[number]
        keep.append((unfinished, finished))
        batch.folders[number].unfinished_path = <bytes> unfinished
        batch.folders[number].finished_path = <bytes> finished
    for number in range(batch.file_count):
        folder, group, name, content = files[number]
        if not 0 <= folder < batch.folder_count or not 0 <= group < batch.group_count:
            raise IndexError("no such folder or group")
        file = &batch.files[number]
        file.folder, file.group, file.name, file.fd = folder, group, <bytes> name, -1
        if type(content) is not list:
            file.fd = content
            file.is_there = True
            continue
        keep.append(content)
        file.pieces = batch.pieces + at
        for piece in content:
            file.pieces[file.count].iov_base = <char *> piece
            file.pieces[file.count].iov_len = len(piece)
            file.count += 1
        at += file.count
    return 0


cdef void create(Batch *batch, bint is_synced) noexcept nogil:
    cdef int number
    for number in range(batch.folder_count):
        check_folder(batch, &batch.folders[number])
    number = 0
    while number < batch.file_count:
        number = write_files(batch, number, is_synced)
    for number in range(batch.file_count):
        finish(batch, &batch.files[number])
    if is_synced:
        sync_folders(batch)
    for number in range(batch.file_count):
        withdraw(batch, &batch.files[number])
    for number in range(batch.device_count):
        close(batch.devices[number].fd)


cdef void fail(Batch *batch, int group, int error) noexcept nogil:
    if batch.errors[group] == 0:
        batch.errors[group] = error if error else EIO


cdef void check_folder(Batch *batch, Folder *folder) noexcept nogil:
    """Find out whether files can be renamed into a folder that can be synced, and remember its device."""
    cdef stat_t found
    cdef int number
    cdef int fd = open(folder.finished_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd < 0 or fstat(fd, &found) != 0:
        folder.error = errno
        if fd >= 0:
            close(fd)
        return
    for number in range(batch.device_count):
        if batch.devices[number].number == found.st_dev:
            close(fd)
            return
    if batch.device_count == MOST_DEVICES:
        batch.has_more_devices = True
        close(fd)
        return
    batch.devices[batch.device_count].number = found.st_dev
    batch.devices[batch.device_count].fd = fd
    batch.device_count += 1


cdef int write_files(Batch *batch, int start, bint is_synced) noexcept nogil:
    """Write and sync files from a place on, as many as may be open together. Return the place of the next one."""
    cdef int end = start, opened = 0, error, number
    while end < batch.file_count and opened < MOST_OPEN:
        error = write_file(batch, &batch.files[end])
        if (error == EMFILE or error == ENFILE) and opened:
            break  # it is tried again, with the descriptors of those before it
        if error:
            fail(batch, batch.files[end].group, error)
        opened += batch.files[end].fd >= 0
        end += 1
    if is_synced:
        sync_files(batch, start, end)
    for number in range(start, end):
        if batch.files[number].fd >= 0:
            close(batch.files[number].fd)
    return end


cdef int write_file(Batch *batch, File *file) noexcept nogil:
    """Write a file into its first folder, unless it is there already. Return an error number, 0 without an error."""
    cdef char[PATH_OCTETS] path
    cdef Folder *folder = &batch.folders[file.folder]
    if folder.error:
        return folder.error
    if file.is_there or batch.errors[file.group]:
        return 0
    if not join(path, folder.unfinished_path, file.name):
        return ENAMETOOLONG
    file.fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
    file.is_there = file.fd >= 0
    return 0 if file.fd >= 0 and write_pieces(file) == 0 else errno


cdef bint join(char *path, const char *folder, const char *name) noexcept nogil:
    """Write the path of a file. Return False if it is too long."""
    return <size_t> snprintf(path, PATH_OCTETS, "%s/%s", folder, name) < PATH_OCTETS


cdef int write_pieces(File *file) noexcept nogil:
    cdef iovec *piece = file.pieces
    cdef iovec *end = file.pieces + file.count
    cdef ssize_t written
    while piece < end:
        written = writev(file.fd, piece, min(end - piece, IOV_MAX))
        if written < 0:
            if errno == EINTR:
                continue
            return -1
        while piece < end and <size_t> written >= piece.iov_len:
            written -= piece.iov_len
            piece += 1
        if written:
            piece.iov_base = <char *> piece.iov_base + written
            piece.iov_len -= written
    return 0


cdef void sync_files(Batch *batch, int start, int end) noexcept nogil:
    cdef int number, count = 0
    cdef File *file
    for number in range(start, end):
        count += is_unsynced(batch, &batch.files[number])
    if count >= MANY and sync_devices(batch):
        for number in range(start, end):
            file = &batch.files[number]
            # A failed write of one that was written before the batch is not reported to the descriptor of the device.
            if file.pieces == NULL and is_unsynced(batch, file) and fdatasync(file.fd) != 0:
                fail(batch, file.group, errno)
        return
    if count > 1:  # in a pass of its own: while files are being created, it costs four times as much
        for number in range(start, end):
            if is_unsynced(batch, &batch.files[number]):
                sync_file_range(batch.files[number].fd, 0, 0, SYNC_FILE_RANGE_WRITE)
    for number in range(start, end):
        file = &batch.files[number]
        if is_unsynced(batch, file) and fdatasync(file.fd) != 0:
            fail(batch, file.group, errno)


cdef bint is_unsynced(Batch *batch, File *file) noexcept nogil:
    return file.fd >= 0 and batch.errors[file.group] == 0


cdef void finish(Batch *batch, File *file) noexcept nogil:
    """Rename a file into place, or remove it if one of its group has failed."""
    cdef char[PATH_OCTETS] path
    cdef char[PATH_OCTETS] new_path
    cdef Folder *folder = &batch.folders[file.folder]
    if not file.is_there or not join(path, folder.unfinished_path, file.name):
        return
    if batch.errors[file.group] == 0:
        if join(new_path, folder.finished_path, file.name):
            if renameat(AT_FDCWD, path, AT_FDCWD, new_path) == 0:
                folder.is_changed = file.is_renamed = True
                return
            fail(batch, file.group, errno)
        else:
            fail(batch, file.group, ENAMETOOLONG)
    unlink(path)


cdef void withdraw(Batch *batch, File *file) noexcept nogil:
    """Remove a file that was renamed before its group failed: the caller tries the whole group again."""
    cdef char[PATH_OCTETS] path
    if file.is_renamed and batch.errors[file.group]:
        join(path, batch.folders[file.folder].finished_path, file.name)
        unlink(path)


cdef void sync_folders(Batch *batch) noexcept nogil:
    cdef int number, count = 0
    for number in range(batch.folder_count):
        count += batch.folders[number].is_changed
    if count >= MANY and sync_devices(batch):
        return
    for number in range(batch.folder_count):
        if batch.folders[number].is_changed:
            sync_folder(batch, &batch.folders[number])
    for number in range(batch.file_count):
        if batch.folders[batch.files[number].folder].error:
            fail(batch, batch.files[number].group, batch.folders[batch.files[number].folder].error)


cdef void sync_folder(Batch *batch, Folder *folder) noexcept nogil:
    # Opened only now: a journal that could not be written fails for every descriptor, not only for earlier ones.
    cdef int fd = open(folder.finished_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if fd >= 0:
        if fsync(fd) != 0:
            folder.error = errno
        close(fd)
        return
    folder.error = errno
    if (errno == EMFILE or errno == ENFILE) and sync_all_devices(batch):
        folder.error = 0  # others have taken the descriptor that was free when the files were written


cdef bint sync_devices(Batch *batch) noexcept nogil:
    """Sync the file systems of the folders, if that is quick. Return whether everything is on stable storage."""
    return dirty_kib() <= MOST_DIRTY_KIB and sync_all_devices(batch)


cdef bint sync_all_devices(Batch *batch) noexcept nogil:
    """Sync the file systems of the folders, each once. Return whether everything is on stable storage."""
    cdef int number
    if not syncfs_reports_errors or batch.has_more_devices:
        return False
    for number in range(batch.device_count):
        if syncfs(batch.devices[number].fd) != 0:
            return False
    return True


cdef long dirty_kib() noexcept nogil:
    """Return the KiB that wait to be written to disks, as the system counts them."""
    cdef char[256] line
    cdef long kib = 1 << 40  # unknown: too many
    cdef FILE *file = fopen("/proc/meminfo", "re")
    if file == NULL:
        return kib
    while fgets(line, sizeof(line), file) != NULL:
        if sscanf(line, "Dirty: %ld", &kib) == 1:
            break
    fclose(file)
    return kib
