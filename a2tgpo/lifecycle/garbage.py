"""Keep Python's garbage collector away from objects that live as long as the process."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_objects() -> Iterator[None]:
    """Collect no garbage inside the context, and never examine the objects that exist at its end.

    Use the context for the import of large libraries. The imports create about a million objects, almost all of which
    live as long as the process. Without the context, Python would search these objects for garbage again and again,
    during the imports and afterwards. The searches would take almost a third of the time of the imports.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_garbage() -> None:
    """Keep Python from searching for garbage while this process ends. A program calls this last.

    Otherwise Python would search all objects several times, although the system frees the memory anyway.
    """
    gc.freeze()
    gc.disable()
