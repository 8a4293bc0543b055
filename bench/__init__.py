"""Benchmarks and failure tests, most of them beside other mail servers; `python -m bench` lists them."""
