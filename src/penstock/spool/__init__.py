"""DISK: the durable queue.

spool.py is what deliveries and the relay see, entry.py what goes in and out; committer.py makes one fsync of many
wishes, store.py and schema.sql are the database, bodies.py the files of large bodies, room.py whether there is room.
"""
