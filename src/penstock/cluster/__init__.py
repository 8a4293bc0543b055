"""The replicated queue: messages in streams of NATS JetStream, so that an accepted message survives a machine.

    JetStreamDelivery --> Writer --publish--> stream, on a majority of the servers
                              |
                              +--> ReplicatedQueue --> scheduler, recorder: the relay as with the spool

`layout` says what is where in the streams, `jetstream` speaks the API of JetStream, `writer` publishes messages,
`leases` decides which node relays which partition, `queue` is the queue of the relay (with an index on the local disk
that is thrown away and rebuilt from the stream), `forwarder` moves what was spooled during an outage into the stream,
`durability` looks whether the servers sync before they acknowledge, `setup` makes and checks streams, `node` puts all
of it together.
"""
