"""Side by side with the rivals' own code; `python tools/bench_rivals --help` and README.md say how."""
