"""What operators see of a running server and ask of it: /metrics, the control socket, the sums of all workers."""
