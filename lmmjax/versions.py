"""Which distributions are installed here: what checkpoints, reports and benchmarks record."""

from importlib import metadata


def installed(name: str) -> str | None:
    """Returns the version of an installed distribution, or None; lmmjax itself may run from a source tree."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
