"""Promise 1, shown: the last acknowledged checkpoint is never lost, and nothing that isn't whole is resumed from."""
