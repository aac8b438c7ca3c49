"""Recognise addresses of web servers."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_http_address(text: str) -> bool:
    """Return whether `text` is an http:// or https:// address with a well-formed host name."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        is_valid_port = parts.port is None or parts.port > 0  # reading a port above 65535 raises ValueError
        host.encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and is_valid_port and len(text.split()) == 1
