"""The coverage-guided fuzzer of `make fuzz`."""
