"""Programs around the benchmarks: device checks, compiler reports, tuners, text, and reference models."""
