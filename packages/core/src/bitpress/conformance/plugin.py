"""The pytest plugin of the conformance kit: the options `--scheme` and `--set`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the kit's options."""
    group = parser.getgroup("bitpress", "bitpress.conformance: the laws that every scheme keeps")
    group.addoption(
        "--scheme",
        action="append",
        default=[],
        metavar="NAME",
        help="the installed scheme to try; may be repeated",
    )
    group.addoption(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="fix an option; may be repeated",
    )
