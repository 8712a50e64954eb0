"""The laws that every scheme keeps, to be run by its author: `pytest --pyargs bitpress.conformance
--scheme NAME`.

Needs the extra `bitpress-core[conformance]`. Every law runs for the scheme's default options and
for each other choice of an option with listed values; `--set OPTION=VALUE` fixes an option. A hook
that a scheme leaves out skips its laws and says so.
"""
