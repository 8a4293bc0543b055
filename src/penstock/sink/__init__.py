"""The load-test target: faults from a plan, and receipts of what arrived."""
