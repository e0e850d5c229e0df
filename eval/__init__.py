"""Benchmarks: questions asked (`run`), answers scored (`scoring`), models compared (`compare`, `statistics`)."""
