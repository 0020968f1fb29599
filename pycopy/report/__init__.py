"""What only reads: the ledger, and everything that shows it."""
