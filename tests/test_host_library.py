"""The trie builder as Python calls it: threads, arrays that do not fit, what it was built with."""

from __future__ import annotations

import numpy as np
import pytest

from sidmlp_kernels.trie import host_library


def test_threads_do_not_change_a_bit():
    build_trie = host_library().build_trie
    rng = np.random.default_rng(3)
    codes = rng.integers(0, [5, 8192, 2], (20_011, 3), dtype=np.int32)
    ids = rng.permutation(len(codes))
    stock = rng.integers(0, 2, len(codes), dtype=np.uint8)
    one = build_trie(codes, ids, stock, [5, 8192, 2], threads=1)
    np.testing.assert_array_equal(one["leaf_item_ids"], ids[one["leaf_order"]])
    np.testing.assert_array_equal(one["leaf_available"], stock[one["leaf_order"]])
    for other in (
        build_trie(codes, ids, stock, [5, 8192, 2], threads=5),
        build_trie(codes.astype(np.int16), ids, stock, [5, 8192, 2], threads=2),
        build_trie(codes[:3], ids[:3], None, [5, 8192, 2], threads=8),
    ):
        same = one if len(other["leaf_order"]) == len(codes) else None
        expected = same or build_trie(codes[:3], ids[:3], None, [5, 8192, 2], threads=1)
        assert other.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(other[name], expected[name], err_msg=name)


def test_builder_rejects_bad_arrays():
    build_trie = host_library().build_trie
    codes, ids = np.zeros((4, 2), np.int16), np.arange(4)
    flags = np.ones(4, np.uint8)
    unaligned = np.frombuffer(bytearray(17), np.int16, 8, offset=1).reshape(4, 2)
    endless = np.broadcast_to(codes[:1], (2**31, 2))  # claims 2^31 items, owns one
    for bad_codes, bad_ids, bad_flags, sizes, match in [
        (codes.astype(np.int64), ids, flags, [1, 1], "int16 or int32"),
        (codes.astype(">i2"), ids, flags, [1, 1], "int16 or int32"),
        (codes[0], ids, flags, [1, 1], "items, levels"),
        (codes[:, ::-1], ids, flags, [1, 1], "C-contiguous"),
        (unaligned, ids, flags, [1, 1], "aligned"),
        (endless, ids, flags, [1, 1], "2147483648 items"),
        (codes[:0], ids[:0], flags[:0], [1, 1], "empty"),
        (np.zeros((1, 9), np.int16), ids[:1], None, [1] * 9, r"1\.\.8"),
        (codes, ids[:3], flags, [1, 1], r"item_ids: expected int64 \[4\]"),
        (codes, ids.astype(np.int32), flags, [1, 1], "item_ids"),
        (codes, ids, flags[:3], [1, 1], "available"),
        (codes, ids, flags.astype(bool), [1, 1], "available"),
        (codes, np.arange(8)[::2], flags, [1, 1], "contiguous"),
        (codes, ids, flags, [1], "codes_per_level"),
        (codes, ids, flags, [1, 0], "level 2 is 0"),
        (codes, ids, flags, [32768, 1], "level 1 is 32768"),
        (codes + np.int16(1), ids, flags, [2, 1], r"item 0 .*level 2.*0\.\.0, got 1"),
        (codes.astype(np.int32) - 70_000, ids, flags, [1, 1], "got -70000"),
    ]:
        with pytest.raises(ValueError, match=match):
            build_trie(bad_codes, bad_ids, bad_flags, sizes)
    with pytest.raises(ValueError, match="threads"):
        build_trie(codes, ids, flags, [1, 1], threads=-1)


def test_build_info():
    info = host_library().build_info()
    assert info.keys() == {"compiler", "flags", "version", "cuda", "instruction_sets"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert isinstance(info["cuda"], bool)
