"""The demonstration: two backdoored digit classifiers, guarded on a real Triton, measured through its answers."""
