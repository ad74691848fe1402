"""Random networks on random ranks against one process: a hypothesis-driven fuzzer."""
