"""What a guard costs where it is served: guarded and unguarded in turns, by perf_analyzer or a built-in load generator."""
