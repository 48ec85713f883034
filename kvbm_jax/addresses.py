"""Addresses as they may be shown: in errors, in logs, and in what a configuration says of itself."""

__all__ = ["public"]


def public(url: str) -> str:
    """Returns an address without its credentials, which is all that stands before its last `@`."""
    head, at, place = url.rpartition("@")
    scheme, separator, _ = head.partition("://")
    return f"{scheme}://...@{place}" if separator else f"...@{place}" if at else url
