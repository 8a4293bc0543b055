"""The durable queue.

queue.py is what deliveries and the relay need of a queue, and spool.py the one on disk; entry.py has the types that go
in and out. committer.py is the group commit, store.py and schema.sql the database, bodies.py the files of large bodies,
diskspace.py the free space check, admin.py and admins.py the operator's access from another process.
"""
