"""What happens when: the loop, the buffer, supervision, the ledger, and the command line."""
