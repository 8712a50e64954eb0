"""Tests that every scheme must pass: `pytest --pyargs bitpress.conformance --scheme NAME`.

The kit needs the extra `bitpress-core[conformance]`. Each test states one law. It runs for the
default options, and for every other value of each option that has a list of values.
`--set OPTION=VALUE` fixes an option. If a scheme lacks a hook, the tests of that hook are skipped.
"""
