"""The durable queue.

spool.py is the interface for deliveries and the relay, entry.py the types that go in and out; committer.py is the group
commit, store.py and schema.sql the database, bodies.py the files of large bodies, diskspace.py the free space check,
admin.py and admins.py the operator's access from another process.
"""
