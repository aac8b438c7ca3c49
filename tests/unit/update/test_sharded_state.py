from __future__ import annotations

import os
import pickle

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from a2tgpo.checkpoint.sharded_state import _check_index


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_an_index_that_would_run_code_is_refused_before_it_does(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Exploit()}))
    with pytest.raises(ValueError, match="mkdir"):
        _check_index(tmp_path / ".metadata")
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "os", "operator", "fsspec"])
def test_an_index_cannot_reach_other_modules_through_those_it_may_name(tmp_path, name) -> None:
    index = tmp_path / ".metadata"
    module = "torch.distributed.checkpoint.filesystem"
    parts = pickle.SHORT_BINUNICODE
    encoded = b"".join(parts + bytes([len(text)]) + text.encode() for text in (module, name))
    index.write_bytes(pickle.PROTO + b"\x04" + encoded + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises((ValueError, AttributeError)):
        _check_index(index)


def test_an_index_that_has_bytes_for_a_tensor_is_refused(tmp_path) -> None:
    """Torch would unpickle these bytes."""
    index = Metadata(state_dict_metadata={"model.weight": BytesStorageMetadata()})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"no tensor for 'model.weight'"):
        _check_index(tmp_path / ".metadata")


def test_one_changed_byte_of_an_index_does_not_take_all_memory(tmp_path) -> None:
    """Unpickling this index would fill a table of 32 GiB, and end the process if memory is smaller."""
    index = tmp_path / ".metadata"
    index.write_bytes(
        pickle.PROTO + b"\x04" + pickle.NONE + pickle.LONG_BINPUT + b"\x00\x00\x00\x80" + pickle.STOP
    )
    with pytest.raises(ValueError, match="memo entry 2147483648"):
        _check_index(index)
