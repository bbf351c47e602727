"""Errors of the store, as the errors that callers of admission handle: same message, code and reasons."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from deltaserve.errors import Reason, StorageFull, error_class
from deltaserve_store.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def typed_failures() -> Iterator[None]:
    """``StoreError`` becomes the ``DeltaserveError`` of its status; a full disk becomes ``StorageFull``."""
    try:
        yield
    except StoreError as error:
        reasons = [Reason(reason.code, reason.where, reason.found, reason.allowed) for reason in error.reasons]
        raise error_class(error.status)(
            error.message,
            param=error.param,
            code=error.error_code,
            retry_after_seconds=error.retry_after_seconds,
            reasons=reasons,
        ) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull("The disk of the adapter store is full; delete adapters or run `store gc`.") from error
