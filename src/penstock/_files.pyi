"""Creates many files at once; see ext/files.pyx."""

def publish(
    folders: list[tuple[bytes, bytes]],
    files: list[tuple[int, int, bytes, list[bytes] | int]],
    groups: int,
    is_synced: bool,
) -> list[int]:
    """Create files in folders. Return a list with an error number for each group of files, 0 if it was created."""
