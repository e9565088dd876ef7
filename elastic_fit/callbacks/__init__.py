"""Inside the worker: adapters to Lightning."""
