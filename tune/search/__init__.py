"""What a sweep tries next and what it has seen: the ledger, the samplers, early stopping, budgets."""
