"""The replicated queue: messages in streams of NATS JetStream, so that an accepted message survives a machine.

    JetStreamDelivery --> Writer --publish--> stream, on a majority of the servers
                              |
                              +--> ReplicatedQueue --> scheduler, recorder: the relay as with the spool

`layout` defines the contents of the streams, `jetstream` implements the API of JetStream, `writer` publishes messages,
`leases` decides which node relays which partition, `queue` is the queue of the relay (with an index on the local disk
that is discarded and rebuilt from the stream), `forwarder` moves mail of an outage from the spool into the stream,
`control` has what operators have requested of all nodes, `exchange` and `state` what nodes have found beside mail,
`durability` looks whether the servers sync before they acknowledge, `setup` makes and checks streams, `node` puts all
of it together.
"""
