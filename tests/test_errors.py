"""Exit codes and classes of errors."""

import errno
import pickle

import pyarrow
import pytest
from safetensors import SafetensorError

from pipeline.errors import (
    ConfigError,
    DiskFullError,
    PipelineError,
    PreemptedError,
    ShardError,
    StorageError,
    after_start,
    storage_error,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ShardError("damaged"), 1), (ConfigError("fp16"), 1), (StorageError("full"), 1), (PreemptedError("left"), 75)],
)
def test_after_start_input_errors_exit_with_1_also_beyond_a_pickle(error: PipelineError, code: int) -> None:
    with pytest.raises(type(error)) as caught, after_start():
        raise error
    assert caught.value is error
    assert pickle.loads(pickle.dumps(error)).exit_code == code
    assert type(error)("elsewhere").exit_code == type(error).exit_code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (pyarrow.lib.ArrowException("[Errno 28] Error writing. Detail: No space left on device"), DiskFullError),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
        (RuntimeError("the bucket does not answer"), StorageError),
    ],
)
def test_storage_error_of_a_full_disk_is_disk_full_error(error: Exception, kind: type[StorageError]) -> None:
    found = storage_error("cannot store it", error)
    assert type(found) is kind
    assert str(found) == "cannot store it"
