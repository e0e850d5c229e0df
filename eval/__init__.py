"""Benchmarks: questions asked (`run`), answers read (`reading`) and scored (`scoring`), models compared (`compare`,
`statistics`)."""
