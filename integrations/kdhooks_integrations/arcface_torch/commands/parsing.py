"""The one way in which these commands make a parser of their options."""

import argparse


def make_parser(
    command: str, about: str | None, usage: str | None = None
) -> argparse.ArgumentParser:
    """about: the docstring of the command's module, shown by --help as it is written."""
    return argparse.ArgumentParser(
        prog=f"kdhooks {command}",
        usage=usage,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
